"""The shipped files, what they link to, and which part may import which.

The tests also run against an installed wheel. Those that read the source tree are skipped where
there is none beside the tests.
"""

import ast
import doctest
import importlib.metadata
import importlib.util
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mutants import MUTANTS, planted
from support import needs_extension, run_script

import fastrnn
from fastrnn.dispatch import BACKENDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

pytestmark = pytest.mark.installed

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "fastrnn"
KERNELS = ROOT / "kernels"

# From the top down. A part imports only itself and the parts below it; `fastrnn/__init__.py` may
# import anything.
LAYERS = [
    "__main__",
    "bptt",
    "convert",
    "diagnostics",
    "explain",
    "init",
    "modules",
    "functional",
    "autograd",
    "operators",
    "onnx",
    "dispatch",
    "backends",
    "capture",
    "kernels",
    "layer",
    "cells",
    "_cpp",
]

# The packages that a part may import besides the standard library, where not torch alone.
THIRD_PARTY = {
    "diagnostics": {"torch", "matplotlib"},
    "kernels": {"torch", "numba", "llvmlite", "triton", "rich"},
}

needs_tree = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file() or not SOURCE.is_dir(),
    reason="reads the source tree, and there is none beside the tests",
)


class Import(NamedTuple):
    name: str  # absolute and dotted
    line: int
    relative: bool
    lazy: bool  # inside a function, or for type checkers only


def source_files() -> list[tuple[Path, str]]:
    """Each Python file that is shipped, with the dotted name it has when installed."""
    return [
        (path, ".".join([package, *path.relative_to(root).with_suffix("").parts]))
        for root, package in [(SOURCE, "fastrnn"), (KERNELS, "fastrnn.kernels")]
        for path in sorted(root.rglob("*.py"))
    ]


def imports(path: Path, module: str) -> Iterator[Import]:
    package = module.split(".")[:-1]
    modules = {name.removesuffix(".__init__") for _, name in source_files()}

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, False, lazy)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                # `from fastrnn import dispatch` imports a module, `import LSTM` a name.
                full = f"{base}.{alias.name}"
                name = full if full in modules or full == "fastrnn._cpp" else base
                yield Import(name, node.lineno, node.level > 0, lazy)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                inside = True
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def all_imports() -> list[tuple[str, str, Import]]:
    """Each import in the shipped files: its place, its module, and the import."""
    return [
        (f"{path.relative_to(ROOT)}:{found.line}", module, found)
        for path, module in source_files()
        for found in imports(path, module)
    ]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".bptt",
        ".convert",
        ".diagnostics",
        ".dispatch",
        ".explain",
        ".init",
        ".modules.layers",
        ".modules.cells",
    ],
)
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"fastrnn{name}"))
    assert found.attempted and not found.failed


def test_public_names_are_documented() -> None:
    """Each class and function by itself, and each parameter of a function by its name."""
    modules = [fastrnn, *filter(inspect.ismodule, map(vars(fastrnn).get, fastrnn.__all__))]
    assert len(modules) > 1
    for module in modules:
        for name in module.__all__:
            thing = vars(module)[name]
            if not isinstance(thing, type) and not inspect.isfunction(thing):
                assert inspect.ismodule(thing) and thing.__doc__, name
                continue
            text = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
            assert text and len(text.split()) > 5, name
            if inspect.isfunction(thing):
                for parameter in inspect.signature(thing).parameters:
                    assert re.search(rf"\b{parameter}\b", text), f"{name}: {parameter}"


@needs_tree
def test_imports_point_down_only() -> None:
    wrong = []
    for place, module, found in all_imports():
        part = module.split(".")[1]
        top, *rest = found.name.split(".")
        if top == "fastrnn":
            target = rest[0] if rest else "__init__"
            if not {part, target} <= {"__init__", *LAYERS}:
                wrong.append(f"{place}: give {part} and {target} their places in LAYERS")
            elif part != "__init__" and (
                target == "__init__" or LAYERS.index(target) < LAYERS.index(part)
            ):
                wrong.append(f"{place}: {part} imports {found.name}, which is above it")
        elif top not in sys.stdlib_module_names | THIRD_PARTY.get(part, {"torch"}):
            wrong.append(f"{place}: {part} imports {top}")
    assert not wrong, "\n".join(wrong)


@needs_tree
def test_backends_are_imported_lazily() -> None:
    """`fastrnn.backends` itself only defines the protocol."""
    backends = re.compile(r"fastrnn\.(backends\.\w+|kernels\b.*|_cpp)")
    wrong = [
        f"{place}: imports {found.name} with the module"
        for place, module, found in all_imports()
        if backends.fullmatch(found.name)
        and (module == "fastrnn.backends.__init__" or not backends.fullmatch(module))
        and not found.lazy
    ]
    assert not wrong, "\n".join(wrong)


@needs_tree
def test_kernels_are_imported_under_one_name() -> None:
    """From the root of the tree `import kernels` works too, and makes a second copy."""
    wrong = [
        f"{place}: imports {found.name}"
        for place, module, found in all_imports()
        if found.name.split(".")[0] == "kernels"
        or (found.relative and "fastrnn.kernels" in f"{module} {found.name}")
    ]
    assert not wrong, "\n".join(wrong)


@needs_tree
def test_every_package_is_listed() -> None:
    """An editable install finds a package that the list lacks; the wheel would not have it."""
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {
        module.removesuffix(".__init__")
        for path, module in source_files()
        if path.name == "__init__.py"
    }
    assert found == set(settings["tool"]["setuptools"]["packages"])


@needs_tree
def test_every_planted_fault_has_its_place() -> None:
    """``make mutants`` takes hours, and would end at the first that has none."""
    for mutant in MUTANTS:
        planted(mutant, (ROOT / mutant.path).read_text(encoding="utf-8"))


def test_version_is_that_of_the_metadata() -> None:
    assert fastrnn.__version__ == importlib.metadata.version("fastrnn")


@needs_tree
def test_version_is_that_of_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert fastrnn.__version__ == settings["project"]["version"], "install fastrnn again"


def test_types_are_shipped() -> None:
    assert Path(fastrnn.__file__).with_name("py.typed").is_file()


def test_import_costs_little_more_than_torch(tmp_path: Path) -> None:
    script = """
        import sys, torch
        before = set(sys.modules)
        import fastrnn
        print(*set(sys.modules) - before)
    """
    new = set(run_script(script, tmp_path).split())
    slow = {
        "matplotlib",
        "numba",
        "numpy",
        "pybind11",
        "rich",
        "triton",
        "torch._dynamo",
        "torch._inductor",
    }
    own = {"fastrnn._cpp", "fastrnn.backends.cpp", "fastrnn.kernels"}
    assert "fastrnn" in new
    assert not new & (slow | own)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_import_starts_no_thread(tmp_path: Path) -> None:
    script = """
        import os, torch
        before = len(os.listdir("/proc/self/task"))
        import fastrnn
        fastrnn.LSTM(3, 4)
        print(len(os.listdir("/proc/self/task")) - before)
    """
    assert run_script(script, tmp_path) == "0"


def test_a_second_process_does_not_compile(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    script = """
        import torch, fastrnn
        for cls, dtype in ((fastrnn.LSTM, torch.float32), (fastrnn.RNN, torch.float64)):
            with fastrnn.use_backend("numba"):
                cls(4, 5, dtype=dtype)(torch.randn(2, 3, 4, dtype=dtype))[0].sum().backward()
        from fastrnn.kernels.numba import cells, launch, sequence
        hits = 0
        for mode, dtype in (("LSTM", torch.float32), ("RNN_TANH", torch.float64)):
            for loop in sequence.compiled(launch.ELEMENTS[dtype]):
                hits += sum(loop.stats.cache_hits.values())
            for function in cells.compiled(mode, launch.ELEMENTS[dtype]):
                hits += function.cache_hits
        print(hits)
    """
    runs = [int(run_script(script, tmp_path, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2)]
    assert runs == [0, 2 * (2 + 2)]


def test_processes_with_other_vectors_share_no_kernels(tmp_path: Path) -> None:
    """As on a cluster of different machines that compile for their common features."""
    pytest.importorskip("numba")
    script = """
        import llvmlite.binding as llvm
        {first}
        import torch, fastrnn
        m, x = fastrnn.GRU(8, 24), torch.randn(5, 3, 8)
        with torch.no_grad(), fastrnn.use_backend("numba"):
            y, _ = m(x)
        with torch.no_grad(), fastrnn.use_backend("reference"):
            torch.testing.assert_close(y, m(x)[0])
        from fastrnn.kernels.numba import simd
        print(simd._BYTES)
    """
    shared = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "generic"}
    old = "llvm.get_host_cpu_features = lambda: {}"
    widths = [
        int(run_script(script.format(first=first), tmp_path, **shared)) for first in ("", old)
    ]
    assert widths[1] == 16


def test_info_reports_a_broken_numba(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    (tmp_path / "numba.py").write_text("raise ImportError('NumPy is too new')")
    script = "import runpy; runpy.run_module('fastrnn', run_name='__main__')"
    found = run_script(
        f"import sys; sys.argv = ['fastrnn', 'info']; {script}", PYTHONPATH=str(tmp_path)
    )
    assert re.search(r"^  numba +cannot run: .*NumPy is too new", found, re.MULTILINE), found


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The output of `python -m` with these arguments."""
    monkeypatch.setattr(sys, "argv", list(arguments))
    with pytest.raises(SystemExit) as end:
        runpy.run_module(arguments[0], run_name="__main__")
    assert not end.value.code
    return capsys.readouterr().out


def test_info_reports_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = printed(monkeypatch, capsys, "fastrnn", "info")
    for word in ("fastrnn", "python", "torch", "processor", "threads", "OpenMP", *BACKENDS):
        assert re.search(rf"^ *{word} ", info, re.MULTILINE), info
    assert fastrnn.__version__ in info and str(Path(fastrnn.__file__).parent) in info


@needs_tree
def test_tables_in_the_documents_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", "3.6")
    document = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    table = printed(monkeypatch, capsys, "fastrnn.kernels.triton", "--cost")
    assert f"<!-- cost -->\n{table}<!-- /cost -->" in document
    command = [sys.executable, str(ROOT / "bench" / "graphs.py"), "docs/benchmarks/h200.json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"<!-- h200 -->\n{run.stdout}<!-- /h200 -->" in document


BUILD = """
    import sys, sysconfig
    known = sysconfig.get_config_var
    sysconfig.get_config_var = lambda name: {changed}.get(name, known(name))
    sys.argv[1:] = ["--version"]
    exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


@needs_tree
@pytest.mark.parametrize(
    "changed,environment,why",
    [
        ({"Py_GIL_DISABLED": 1}, {}, "free-threaded Python"),
        ({}, {"CC": "false", "CXX": "false"}, "a trial of the C++ compiler failed"),
        ({}, {"FASTRNN_NO_CPP": "1"}, "FASTRNN_NO_CPP=1"),
    ],
)
def test_a_build_without_the_extension(
    changed: dict[str, Any], environment: dict[str, str], why: str
) -> None:
    """The build continues and reports the reason, unless the extension is required."""
    pytest.importorskip("pybind11")
    for required in (False, True):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(BUILD.format(changed=changed))],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | environment | {"FASTRNN_REQUIRE_CPP": str(int(required))},
        )
        assert "C++ extension is left out: " in run.stderr and why in run.stderr, run.stderr
        assert (run.returncode != 0) == required


@needs_tree
@needs_extension
def test_an_extension_that_does_not_compile(tmp_path: Path) -> None:
    """It is left out as well, though the trial of the compiler succeeded."""
    pytest.importorskip("pybind11")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    command += ["--build-temp", str(tmp_path / "objects"), "--force"]
    for required in (False, True):
        environment = {
            "FASTRNN_CXXFLAGS": "-include nowhere.h",
            "FASTRNN_REQUIRE_CPP": str(int(required)),
        }
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
        )
        assert "nowhere.h" in run.stderr
        assert (run.returncode != 0) == required, run.stderr
        assert not list(tmp_path.rglob("*.so"))


def extension() -> Path:
    spec = importlib.util.find_spec("fastrnn._cpp")
    assert spec is not None, "the extension is not built"
    assert spec.origin is not None
    return Path(spec.origin)


@needs_extension
def test_extension_lies_in_the_package() -> None:
    path = extension()
    assert path.parent == Path(fastrnn.__file__).parent
    assert path.name.endswith(tuple(EXTENSION_SUFFIXES))


@needs_extension
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads an ELF file")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf, of binutils")
def test_extension_links_to_the_system_only() -> None:
    """Not to torch, whose releases it must outlive, nor to an OpenMP runtime of its own.

    libgomp under its plain name is the one that torch has loaded. A build with Clang links to
    Clang's libomp, and has its path.
    """
    run = subprocess.run(
        ["readelf", "--dynamic", "--wide", extension()],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run.stdout)
    system = re.compile(
        r"(libgomp\.so\.1|libomp\.so\S*|libstdc\+\+\.so\.6|libgcc_s\.so\.1|libc\.so\.6"
        r"|libm\.so\.6|libpthread\.so\.0|ld-linux.*\.so\.\d)"
    )
    assert needed
    assert [name for name in needed if not system.fullmatch(name)] == []
    if not any(name.startswith("libomp") for name in needed):
        # Some interpreters give every extension the path of their own libraries.
        paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", run.stdout)
        assert set(paths) <= {sysconfig.get_config_var("LIBDIR")}

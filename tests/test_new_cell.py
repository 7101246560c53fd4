"""CONTRIBUTING.md's "How to add a cell", followed to the letter in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastrnn

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not Path(fastrnn.__file__).is_relative_to(ROOT / "src"),
    reason="builds the source tree, and what is tested is an installed fastrnn",
)


def blocks(language: str) -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources with step 1 done."""
    for name in ("csrc", "src", "kernels", "tests"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (python,) = blocks("python")
    with open(tmp_path / "src/fastrnn/cells.py", "a") as file:
        file.write("\n\n" + python)
    return tmp_path


def run(tree: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "src"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(output: str) -> int:
    return int(re.search(r"(\d+) passed", output)[1])


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not heavy")


def test_the_example_is_new() -> None:
    assert "JANET" not in fastrnn.cells.CELLS


def test_a_cell_in_python_runs_on_the_reference(tree: Path) -> None:
    extension = pytest.importorskip("fastrnn._cpp")
    shutil.copy(extension.__file__, tree / "src/fastrnn")
    said = run(
        tree,
        "-c",
        "import torch, fastrnn; m = fastrnn.RNNBase('JANET', 3, 4); x = torch.randn(5, 2, 3);"
        "print(fastrnn.__file__, m(x)[0].shape, fastrnn.explain(m, x))",
    )
    assert str(tree) in said
    assert "reference" in said
    assert "not cpp: the extension has no cell JANET" in said
    files = [
        f"tests/test_{name}.py" for name in ("reference", "autograd", "bad_input", "operators")
    ]
    chosen = ("-k", "(JANET and not large) or every_cell or wrong_arguments")
    assert passed(run(tree, *PYTEST, *files, *chosen)) > 0


@pytest.mark.timeout(600)
def test_a_cell_in_cpp_is_found_and_held_against_the_reference(tree: Path) -> None:
    (cpp,) = blocks("cpp")
    path = tree / "csrc/cells.inc"
    text = path.read_text()
    assert text.count("#define FASTRNN_CELLS(X)") == 1
    text = text.replace("#define FASTRNN_CELLS(X)", cpp + "\n#define FASTRNN_CELLS(X)")
    path.write_text(re.sub(r"(#define FASTRNN_CELLS\(X\).*)", r"\1 X(Janet)", text))
    run(tree, "setup.py", "-q", "build_ext", "--inplace", FASTRNN_CXXFLAGS="-O1")
    said = run(
        tree,
        "-c",
        "import torch, fastrnn; m = fastrnn.RNNBase('JANET', 3, 4);"
        "print(fastrnn.explain(m, torch.randn(5, 2, 3)))",
    )
    assert said.startswith("cpp:")
    output = run(tree, *PYTEST, "tests/test_backends.py", "-k", "JANET", "--timeout", "300")
    assert passed(output) > 20

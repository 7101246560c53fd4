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
    reason="builds the source tree, and the tested fastrnn is an installed one",
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


EXPLAIN_AND_TEST = """
import sys, pytest, torch, fastrnn
m, x = fastrnn.RNNBase("JANET", 3, 4), torch.randn(5, 2, 3)
print(fastrnn.__file__, m(x)[0].shape, fastrnn.explain(m, x))
options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not heavy", "--timeout", "300"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


def explained_and_tested(tree: Path, files: list[str], names: str) -> tuple[str, int]:
    """What `fastrnn.explain` reports of the cell, and the number of tests that pass."""
    paths = [f"tests/test_{file}.py" for file in files]
    output = run(tree, "-c", EXPLAIN_AND_TEST, *paths, "-k", names)
    first, _, _ = output.partition("\n")
    assert first.startswith(str(tree)) and "torch.Size([5, 2, 4])" in first
    return output, int(re.search(r"(\d+) passed", output)[1])


def build(tree: Path, every_instruction_set: bool) -> None:
    """Step 2. The quick build has the generic engine only, which every processor runs."""
    (cpp,) = blocks("cpp")
    path = tree / "csrc/cells.inc"
    text = path.read_text()
    assert text.count("#define FASTRNN_CELLS(X)") == 1
    text = text.replace("#define FASTRNN_CELLS(X)", cpp + "\n#define FASTRNN_CELLS(X)")
    path.write_text(re.sub(r"(#define FASTRNN_CELLS\(X\).*)", r"\1 X(Janet)", text))
    if not every_instruction_set:
        path = tree / "csrc/isa.h"
        others = "#if defined(__x86_64__)\n\n#define FASTRNN_ISA"
        text = path.read_text()
        assert text.count(others) == 1
        path.write_text(text.replace(others, others.replace("defined(__x86_64__)", "0")))
    run(tree, "setup.py", "-q", "build_ext", "--inplace", FASTRNN_CXXFLAGS="-O1")


def test_the_example_is_new() -> None:
    assert "JANET" not in fastrnn.cells.CELLS


def test_a_cell_in_python_runs_on_the_reference(tree: Path) -> None:
    """Its gradients are checked by finite differences: four layers, and a step."""
    extension = pytest.importorskip("fastrnn._cpp")
    shutil.copy(extension.__file__, tree / "src/fastrnn")
    output, passed = explained_and_tested(
        tree, ["reference", "autograd"], "JANET and (gradcheck or new_sizes or saved or frozen)"
    )
    assert "reference" in output
    assert "not cpp: the extension has no cell JANET" in output
    assert passed >= 8


@pytest.mark.heavy
def test_all_tests_of_a_cell_in_python(tree: Path) -> None:
    extension = pytest.importorskip("fastrnn._cpp")
    shutil.copy(extension.__file__, tree / "src/fastrnn")
    _, passed = explained_and_tested(
        tree,
        ["reference", "autograd", "bad_input", "operators"],
        "(JANET and not large) or wrong_arguments",
    )
    assert passed >= 20


@pytest.mark.timeout(600)
def test_a_cell_in_cpp_matches_the_reference(tree: Path) -> None:
    """Forward and all gradients, in both dtypes."""
    build(tree, every_instruction_set=False)
    output, passed = explained_and_tested(tree, ["backends"], "JANET and (test_layer or few_rows)")
    assert " cpp: automatic choice" in output
    assert passed >= 20


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_all_tests_of_a_cell_in_cpp(tree: Path) -> None:
    build(tree, every_instruction_set=True)
    _, passed = explained_and_tested(tree, ["backends"], "JANET")
    assert passed >= 100

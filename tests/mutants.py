"""``make mutants``: plant one fault at a time, and report which test of the suite finds it.

A fault is one replacement in a copy of the tree. The tests named beside it run first, then the
whole suite of ``make test``, until one fails. The failing test is then run without the fault, where
it must pass. A fault that survives is a missing test: the exit status is 1.

    python tests/mutants.py [PATTERN ...]   only the faults whose path or name contains a pattern
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        name: what is wrong.
        path: the file, from the root of the tree.
        before, after: the text that is replaced, which the file has once, and its replacement.
        tests: arguments of pytest that select the tests most likely to find it.
    """

    name: str
    path: str
    before: str
    after: str
    tests: str


CPP, REFERENCE, TRITON = "tests/test_backends.py", "tests/test_reference.py", "tests/test_triton.py"
NUMBA = "tests/test_backends.py -k numba"
OPERATORS, MODULES, AUTOGRAD = (f"tests/test_{n}.py" for n in ("operators", "modules", "autograd"))

MUTANTS = (
    # The C++ engine: cells, drivers, products, plan, barrier, scratch memory, argument checks.
    Mutant(
        "the LSTM's tanh' has a wrong sign",
        "csrc/cells.inc",
        "dpre[2] = e * i * (1 - g * g);",
        "dpre[2] = e * i * (1 + g * g);",
        CPP,
    ),
    Mutant(
        "the GRU mixes with a wrong sign",
        "csrc/cells.inc",
        "y[0] = n + z * (s[0] - n);",
        "y[0] = n + z * (n - s[0]);",
        CPP,
    ),
    Mutant(
        "relu has a gradient at zero",
        "csrc/cells.inc",
        "dpre[0] = h <= V{} ? V{} : dy[0];",
        "dpre[0] = h < V{} ? V{} : dy[0];",
        CPP,
    ),
    Mutant(
        "the gates i and f change places",
        "csrc/cells.inc",
        "V i = v[0], f = v[1], g = v[2], o = v[3], c = s[1];",
        "V i = v[1], f = v[0], g = v[2], o = v[3], c = s[1];",
        CPP,
    ),
    Mutant(
        "b_hh of gates that are not summed is left out",
        "csrc/driver.inc",
        "return k < kSummed ? k : k < G ? -1 : k - kSplit;",
        "return k < kSummed ? k : -1;",
        CPP,
    ),
    Mutant(
        "the reverse direction runs forward",
        "csrc/driver.inc",
        "return task.direction == 1 ? rows.T - 1 - step : step;",
        "return task.direction == 2 ? rows.T - 1 - step : step;",
        CPP,
    ),
    Mutant(
        "a sequence that begins later enters with the wrong h",
        "csrc/driver.inc",
        "return was_active   ? out",
        "return t_before >= 0 ? out",
        CPP,
    ),
    Mutant(
        "the initial c is ignored",
        "csrc/forward.inc",
        "a.final[k][at + u] = a.state[k] ? a.state[k][at + u] : T(0);",
        "a.final[k][at + u] = T(0);",
        CPP,
    ),
    Mutant(
        "the final h of the reverse direction is that of the last step in time",
        "csrc/forward.inc",
        "d == 1 ? 0 : length - 1, length > 0",
        "length - 1, length > 0",
        CPP,
    ),
    Mutant(
        "c after the step is saved in place of c before it",
        "csrc/forward.inc",
        "for (int k = 1; k < kStates; ++k, to += a.H) store(to, s[k], lanes);",
        "for (int k = 1; k < kStates; ++k, to += a.H) store(to, y[k], lanes);",
        CPP,
    ),
    Mutant(
        "a lane is not masked",
        "csrc/backward.inc",
        "store(to, dpre[k], lanes);",
        "store(to, dpre[k]);",
        CPP,
    ),
    Mutant(
        "the sums of bias gradients are not cleared",
        "csrc/backward.inc",
        "std::fill_n(local.dbias, a.D * S * ld(), T(0));",
        "",
        CPP,
    ),
    Mutant(
        "the last rows are missing from bias gradients",
        "csrc/backward.inc",
        "    carry(0);\n    carry(1);\n    copy_initial_gradient",
        "    carry(1);\n    copy_initial_gradient",
        CPP,
    ),
    Mutant(
        "the gradient of the final h is ignored",
        "csrc/backward.inc",
        "if (a.dfinal[0]) std::copy_n",
        "if (false) std::copy_n",
        CPP,
    ),
    Mutant(
        "the recurrence ends although an earlier output has a gradient",
        "csrc/backward.inc",
        "return step < first_dout;",
        "return true;",
        CPP + " -k gradients_that_end",
    ),
    Mutant(
        "a sequence that ends earlier than others leaves its rows as they were",
        "csrc/backward.inc",
        "if (p0 < p1) clear_to(first_step(task.direction), task);",
        "",
        CPP + " -k gradients_that_end",
    ),
    Mutant(
        "dx is not cleared before the step where the gradient ends",
        "csrc/backward.inc",
        "if (a.dx) clear_dx(thread, working);",
        "",
        CPP + " -k gradients_that_end",
    ),
    Mutant(
        "a job leaves subnormal numbers zero in the threads of torch",
        "csrc/parallel.cpp",
        "set_control(before_);",
        "set_control(before_ | kFlush);",
        CPP + " -k subnormals",
    ),
    Mutant(
        "a long product loses its first block of k",
        "csrc/product.inc",
        "const T* from = k ? c : init;",
        "const T* from = init;",
        CPP,
    ),
    Mutant(
        "dot products ignore the last elements",
        "csrc/product.inc",
        "  if (k < K) {\n    const int n = static_cast<int>(K - k);\n",
        "  if (false) {\n    const int n = static_cast<int>(K - k);\n",
        CPP,
    ),
    Mutant(
        "dx of the second direction replaces that of the first",
        "csrc/matmul.inc",
        "const bool first = k0 == 0 && !a.add,",
        "const bool first = k0 == 0,",
        CPP,
    ),
    Mutant(
        "columns beyond the last whole group lose earlier blocks",
        "csrc/matmul.inc",
        "if (edge && !first) std::copy_n(c + i * r.c_row, g.columns, into + i * ld);",
        "if (edge && !first) std::fill_n(into + i * ld, width, T(0));",
        CPP,
    ),
    Mutant(
        "sequences at a cut between threads are left out",
        "csrc/plan.cpp",
        "tasks.push_back({k - 1, d, first, row});",
        "tasks.push_back({k - 1, d, first + (k > 1), row});",
        CPP + " -k threads",
    ),
    Mutant(
        "the barrier lets a thread pass before the last arrives",
        "csrc/parallel.cpp",
        "memory_order_acq_rel) < count - 1) return false;",
        "memory_order_acq_rel) < 0) return false;",
        CPP + " -k threads",
    ),
    Mutant(
        "scratch memory is not poisoned for tests",
        "csrc/scratch.cpp",
        "if (g_poison.load(std::memory_order_relaxed)) std::memset",
        "if (false) std::memset",
        CPP + " -k poisoned",
    ),
    Mutant(
        "a single bias is accepted",
        "csrc/bindings.cpp",
        'if (!to.bias_ih != !to.bias_hh) fail("expected both bias_ih and bias_hh or neither");',
        "",
        "tests/test_dispatch.py tests/test_bad_input.py",
    ),
    Mutant(
        "tensors with a noted minus sign are read without it",
        "csrc/bindings.cpp",
        "return call(object, names().is_neg).ptr() == Py_True; }",
        "return false; }",
        "tests/test_bad_input.py",
    ),
    Mutant(
        "torch.use_deterministic_algorithms is ignored",
        "csrc/bindings.cpp",
        "a.deterministic = deterministic;",
        "a.deterministic = false;",
        CPP + " -k same",
    ),
    # The reference, and the object of a call.
    Mutant(
        "the gradient of c forgets the forget gate",
        "src/fastrnn/cells.py",
        "return dpre, (None, e * f)",
        "return dpre, (None, e)",
        REFERENCE,
    ),
    Mutant(
        "the cell's own path to the old h is left out",
        "src/fastrnn/backends/reference.py",
        "running[0].add_(ds[0])",
        "pass",
        REFERENCE,
    ),
    Mutant(
        "the h before a step is that of the step after",
        "src/fastrnn/layer.py",
        "before = t + 1 if reverse else t - 1",
        "before = t - 1 if reverse else t + 1",
        REFERENCE,
    ),
    Mutant(
        "batch sizes that overflow are accepted",
        "src/fastrnn/layer.py",
        "if total != N or B > N:",
        "if total != N:",
        "tests/test_dispatch.py -k functional",
    ),
    Mutant(
        "a state of another device is accepted",
        "src/fastrnn/layer.py",
        '        check_like("initial state", s, x)\n\n\ndef check_batch_sizes',
        "\n\ndef check_batch_sizes",
        "tests/test_dispatch.py tests/test_bad_input.py",
    ),
    Mutant(
        "a sum over many rows loses those of the last block",
        "src/fastrnn/backends/products.py",
        "for k in range(ROWS, len(d), ROWS):",
        "for k in range(ROWS, len(d) - ROWS, ROWS):",
        NUMBA,
    ),
    # Autograd, operators, the stack.
    Mutant(
        "gradients are computed that are not needed",
        "src/fastrnn/autograd.py",
        "run(backend, template, tuple(needed), *args)",
        "run(backend, template, (True,) * len(needed), *args)",
        AUTOGRAD,
    ),
    Mutant(
        "vmap over weights runs with those of the first sample",
        "src/fastrnn/autograd.py",
        "shared_weights = all(dim is None for dim in dims[:num_weights])",
        "shared_weights = True",
        "tests/test_transforms.py",
    ),
    Mutant(
        "autocast lowers the precision of second derivatives",
        "src/fastrnn/autograd.py",
        "    return torch.autocast(device, enabled=False)\n",
        "    return nullcontext()\n",
        "tests/test_transforms.py",
    ),
    Mutant(
        "a trace cannot be trained",
        "src/fastrnn/autograd.py",
        "save = is_jit_tracing() or _differentiable(layer, x)",
        "save = _differentiable(layer, x)",
        OPERATORS,
    ),
    Mutant(
        "a graph expects saved activations of the input's dtype",
        "src/fastrnn/operators.py",
        "saved = x.new_empty(shape, dtype=dtype)",
        "saved = x.new_empty(shape)",
        OPERATORS,
    ),
    Mutant(
        "tangents of a captured layer are lost in silence",
        "src/fastrnn/operators.py",
        "    if is_forward_ad():\n",
        "    if False:\n",
        OPERATORS,
    ),
    Mutant(
        "a layer gets the state of another",
        "src/fastrnn/functional.py",
        "tuple(s[k * D : (k + 1) * D] for s in hx)",
        "tuple(s[k : k + D] for s in hx)",
        REFERENCE,
    ),
    Mutant(
        "dropout in evaluation",
        "src/fastrnn/functional.py",
        "hx, dropout if training else 0.0)",
        "hx, dropout)",
        MODULES,
    ),
    Mutant(
        "gates in another order in ONNX",
        "src/fastrnn/onnx.py",
        '"GRU": "zrn"',
        '"GRU": "rzn"',
        OPERATORS + " -k onnx",
    ),
    # Modules.
    Mutant(
        "the state of an unsorted packed batch is permuted twice",
        "src/fastrnn/modules/layers.py",
        "state = permuted(state, sorted_indices)",
        "state = permuted(state, unsorted_indices)",
        MODULES,
    ),
    Mutant(
        "a bidirectional layer accepts the state of one direction",
        "src/fastrnn/modules/compat.py",
        "num_states = self.num_layers * (2 if self.bidirectional else 1)",
        "num_states = self.num_layers",
        MODULES,
    ),
    Mutant(
        "with lengths, sequences without a step lose their state",
        "src/fastrnn/modules/lengths.py",
        "s.to(n.dtype).index_copy(1, active, n)",
        "torch.zeros_like(s).to(n.dtype).index_copy(1, active, n)",
        "tests/test_modules.py -k lengths",
    ),
    Mutant(
        "the state is not detached between windows",
        "src/fastrnn/bptt.py",
        "state = tree_map_only(Tensor, Tensor.detach, state)",
        "",
        "tests/test_bptt.py",
    ),
    Mutant(
        "a forget bias is added to the old one",
        "src/fastrnn/init.py",
        "hh.zero_()",
        "",
        "tests/test_init.py",
    ),
    # Triton, in its interpreter.
    Mutant(
        "the LSTM's gradient has a wrong sign on a GPU",
        "kernels/triton/cells.py",
        "e * i * (1 - g * g)",
        "e * i * (1 + g * g)",
        TRITON,
    ),
    Mutant(
        "biases are left out on a GPU",
        "kernels/triton/launch.py",
        "BIAS=bias,",
        "BIAS=False,",
        TRITON,
    ),
    Mutant(
        "padding of an infinite h enters the product",
        "kernels/triton/sequence.py",
        "            y_h = zero_padding(y[0], unit, H, PADDED)\n",
        "            y_h = y[0]\n",
        TRITON,
    ),
    Mutant(
        "the final state of an ended sequence goes on",
        "kernels/triton/sequence.py",
        "running_s = where_active(active[:, None], y[1:], running_s, STATES - 1)",
        "running_s = y[1:]",
        TRITON,
    ),
    # Numba.
    Mutant(
        "the GRU's gradient has a wrong sign in Numba",
        "kernels/numba/cells.py",
        "d * (load(h_before, j) - n) * z * (1.0 - z)",
        "d * (n - load(h_before, j)) * z * (1.0 - z)",
        NUMBA,
    ),
    Mutant(
        "padding of an infinite h enters the product in Numba",
        "kernels/numba/sequence.py",
        "            clear(y, H, H_pad)\n",
        "",
        NUMBA,
    ),
    Mutant(
        "the recurrence ends although an earlier output has a gradient in Numba",
        "kernels/numba/sequence.py",
        "if step < first_dout:",
        "if True:",
        "tests/test_backends.py -k 'numba and gradients_that_end'",
    ),
    Mutant(
        "the rows of dx that have a gradient are in another place",
        "src/fastrnn/backends/products.py",
        "pad(part, (0, 0, rows.start, N - rows.stop))",
        "pad(part, (0, 0, N - rows.stop, rows.start))",
        "tests/test_backends.py -k 'numba and gradients_that_end'",
    ),
    Mutant(
        "torch's threads keep subnormal numbers zero after Numba",
        "kernels/numba/subnormals.py",
        "        parallel(leave_at, before, threads, 0)",
        "        pass",
        "tests/test_backends.py -k 'numba and subnormals'",
    ),
    Mutant(
        "the last sequence of a thread is left out in Numba",
        "kernels/numba/launch.py",
        "return arguments._replace(**addresses, begin=begin, end=end)",
        "return arguments._replace(**addresses, begin=begin, end=max(begin, end - (begin > 0)))",
        NUMBA,
    ),
    Mutant(
        "an initial state is read from another sequence",
        "kernels/padding.py",
        "into[..., : value.shape[-1]] = value.reshape(D, B, value.shape[-1])",
        "into[..., : value.shape[-1]] = value.reshape(D, B, value.shape[-1]).flip(1)",
        NUMBA,
    ),
)


class Tree:
    """A copy of the files that git knows, with one fault at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shutil.rmtree(path, ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)
        # An editable installation would find the kernels of the original.
        (path / "src/fastrnn/kernels").symlink_to(path / "kernels")
        self.objects = path / "build" / "objects"
        self.build()
        (extension,) = (path / "src/fastrnn").glob("_cpp*.so")
        self.extension, self.clean = extension, path / "build" / extension.name
        shutil.copy2(extension, self.clean)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(self.path / "src"), **environment}
        return subprocess.run(
            [sys.executable, *command], cwd=self.path, env=env, capture_output=True, text=True
        )

    def build(self) -> None:
        """Compile the extension, quickly: the instruction sets share their source."""
        built = self.run(
            "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(self.objects),
            FASTRNN_REQUIRE_CPP="1", FASTRNN_CXXFLAGS="-O1",
        )  # fmt: skip
        if built.returncode:
            raise RuntimeError(built.stdout + built.stderr)

    def pytest(self, *arguments: str) -> str | None:
        """The first test that fails, or None."""
        done = self.run(
            "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal",
            "-m", "not heavy", *arguments,
        )  # fmt: skip
        found = re.search(r"^(?:FAILED|ERROR) (\S+.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
        if found:
            return found[1]
        if done.returncode:
            raise RuntimeError(f"pytest: {done.returncode}\n{done.stdout}{done.stderr}")
        return None

    def finds(self, mutant: Mutant) -> str | None:
        """The test that finds a fault, or None if it survives the suite."""
        path = self.path / mutant.path
        text = path.read_text(encoding="utf-8")
        path.write_text(planted(mutant, text), encoding="utf-8")
        try:
            if mutant.path.startswith("csrc/"):
                self.build()
            test = self.pytest(*shlex.split(mutant.tests)) or self.pytest("tests")
        finally:
            path.write_text(text, encoding="utf-8")
            shutil.copy2(self.clean, self.extension)
        if test and (without := self.pytest(test)):
            raise RuntimeError(f"{without} fails without a fault, too")
        return test


def planted(mutant: Mutant, text: str) -> str:
    """The text of a file with the fault."""
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.path}: expected once, found {text.count(mutant.before)} times: "
                         f"{mutant.before}")  # fmt: skip
    return text.replace(mutant.before, mutant.after)


def main(patterns: list[str]) -> int:
    chosen = [
        m for m in MUTANTS if not patterns or any(p in f"{m.path} {m.name}" for p in patterns)
    ]
    tree = Tree(ROOT / "build" / "mutants")
    survivors = 0
    print("| fault | in | found by | seconds |\n|---|---|---|---:|", flush=True)
    for mutant in chosen:
        began = time.monotonic()
        test = tree.finds(mutant)
        survivors += test is None
        shown = f"`{test}`" if test else "**nothing**"
        seconds = time.monotonic() - began
        print(f"| {mutant.name} | {mutant.path} | {shown} | {seconds:.0f} |", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults were found")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The cases that every backend runs, the tolerances, and the reference results.

``CASES`` is for every run: a small set in which each value of each factor occurs together with each
value of each other factor. ``grid`` is the full product of the options, at each of a few sizes in
the tests marked ``heavy``. New cells and backends are found through
``fastrnn.cells.CELLS`` and ``fastrnn.dispatch.BACKENDS``.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache, partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.cells import CELLS, Cell
from fastrnn.dispatch import BACKENDS, load_backend

Results = dict[str, Tensor]

needs_extension = pytest.mark.skipif(
    os.environ.get("FASTRNN_NO_CPP") == "1",
    reason="installed without the extension (FASTRNN_NO_CPP=1)",
)


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the reference.

    Attributes:
        rtol: relative to the element.
        atol: relative to the largest element of the tensor, or to 1 if that is smaller.
    """

    rtol: float
    atol: float


# Room for another order of summation and, in float32, for activations good to 1e-7, over up to 130
# products, 20 steps and 2 layers.
TOLERANCE = {
    torch.float64: Tolerance(rtol=1e-10, atol=1e-13),
    torch.float32: Tolerance(rtol=4e-6, atol=4e-6),
}

OPTIONS: dict[str, Sequence[Any]] = {
    "mode": tuple(CELLS),
    "directions": (1, 2),
    "layers": (1, 2),
    "bias": (True, False),
    "layout": ("dense", "batch_first", "unbatched", "packed", "unsorted"),
    "projected": (False, True),
    "hx": (True, False),
}
# Sizes on both sides of a tile, of up to 13 rows and of 4, 8 or 16 lanes. Every remainder of every
# tile is in test_every_hidden_size_and_batch; more values here would multiply the cases.
SIZES: dict[str, Sequence[int]] = {
    "T": (1, 2, 3, 20),
    "B": (1, 2, 5, 8, 13),
    "I": (1, 3, 16, 17, 100),
    "H": (1, 2, 16, 17, 64, 65, 130),
}
GRID_SIZES = (
    (1, 1, 1, 1),
    (1, 1, 300, 256),
    (2, 31, 130, 48),
    (1, 13, 17, 16),
    (2, 1, 3, 100),
    (3, 5, 1, 63),
    (3, 12, 64, 64),
    (4, 6, 2, 4),
    (5, 2, 100, 17),
    (5, 13, 16, 33),
    (6, 10, 33, 100),
    (7, 7, 5, 130),
    (13, 4, 9, 31),
    (20, 3, 2, 8),
)


@dataclass(frozen=True)
class Case:
    """One layer and one input. Sizes: T steps, B sequences, I features, H hidden units."""

    mode: str
    _: KW_ONLY
    directions: int = 1
    layers: int = 1
    bias: bool = True
    layout: str = "dense"
    projected: bool = False
    hx: bool = True
    T: int = 4
    B: int = 3
    I: int = 5
    H: int = 6

    def __str__(self) -> str:
        options = [self.mode, f"D{self.directions}", f"L{self.layers}"]
        options += ["bias"] * self.bias + [self.layout]
        options += ["proj"] * self.projected + ["hx"] * self.hx
        return "-".join([*options, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"])

    @property
    def cell(self) -> Cell:
        return CELLS[self.mode]

    @property
    def P(self) -> int:
        """Size of h."""
        return (self.H + 1) // 2 if self.projected else self.H

    @property
    def packed(self) -> bool:
        return self.layout in ("packed", "unsorted")


def valid(values: Mapping[str, Any]) -> bool:
    """Whether a case may have these values; all rules are about two factors at most."""
    if values.get("layout") == "unbatched" and values.get("B", 1) != 1:
        return False
    if values.get("projected"):
        if values.get("H", 2) == 1:  # proj_size is smaller than hidden_size
            return False
        return "mode" not in values or CELLS[values["mode"]].projectable
    return True


def cover(
    factors: Mapping[str, Sequence[Any]], valid: Callable[[Mapping[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Few choices of one value per factor, with every valid pair of values in at least one.

    Greedy: take a pair that no choice has yet, fill up the other factors at random 30 times, and
    keep the choice that brings the most new pairs. The same in every process: xdist needs that.
    """
    draw = random.Random(0)
    missing = {
        ((a, x), (b, y)): None
        for a, b in combinations(factors, 2)
        for x, y in product(factors[a], factors[b])
        if valid({a: x, b: y})
    }
    chosen = []
    while missing:
        pair = dict(next(iter(missing)))
        candidates: list[dict[str, Any]] = []
        while len(candidates) < 30:
            values = {name: pair.get(name, draw.choice(factors[name])) for name in factors}
            if valid(values):
                candidates.append(values)
        best = max(candidates, key=lambda c: sum(p in missing for p in combinations(c.items(), 2)))
        for p in combinations(best.items(), 2):
            missing.pop(p, None)
        chosen.append(best)
    return chosen


CASES = [Case(**values) for values in cover({**OPTIONS, **SIZES}, valid)]


def grid(mode: str, sizes: tuple[int, ...]) -> Iterator[Case]:
    """Every combination of the options of a cell, at one of ``GRID_SIZES``."""
    fixed = dict(zip(SIZES, sizes, strict=True)) | {"mode": mode}
    options = {name: values for name, values in OPTIONS.items() if name != "mode"}
    for chosen in product(*options.values()):
        values = fixed | dict(zip(options, chosen, strict=True))
        if valid(values):
            yield Case(**values)


@contextmanager
def naming(case: Case) -> Iterator[None]:
    """Name the case in a failure, for tests that run several."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


# The modes of torch.nn: our class and theirs. A new cell has neither.
LAYERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "RNN_TANH": (fastrnn.RNN, nn.RNN),
    "RNN_RELU": (partial(fastrnn.RNN, nonlinearity="relu"), partial(nn.RNN, nonlinearity="relu")),
    "LSTM": (fastrnn.LSTM, nn.LSTM),
    "GRU": (fastrnn.GRU, nn.GRU),
}
STEPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "RNN_TANH": (fastrnn.RNNCell, nn.RNNCell),
    "RNN_RELU": (
        partial(fastrnn.RNNCell, nonlinearity="relu"),
        partial(nn.RNNCell, nonlinearity="relu"),
    ),
    "LSTM": (fastrnn.LSTMCell, nn.LSTMCell),
    "GRU": (fastrnn.GRUCell, nn.GRUCell),
}


def layered() -> list[str]:
    """The backends that run here layer by layer, behind fastrnn's autograd Function.

    Triton's interpreter is slow; test_triton.py tests it.
    """
    here = [
        b for b in BACKENDS if load_backend(b).missing() is None and load_backend(b).kind == "layer"
    ]
    return [b for b in here if b != "triton"]


def runnable() -> list[str]:
    """The backends of :func:`layered` without the reference."""
    return [b for b in layered() if b != "reference"]


def arguments(case: Case) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "num_layers": case.layers,
        "bias": case.bias,
        "batch_first": case.layout == "batch_first",
        "bidirectional": case.directions == 2,
    }
    if case.projected:
        kwargs["proj_size"] = case.P
    return kwargs


def ours(case: Case, dtype: torch.dtype, seed: int = 1) -> fastrnn.RNNBase:
    torch.manual_seed(seed)
    make = LAYERS[case.mode][0] if case.mode in LAYERS else partial(fastrnn.RNNBase, case.mode)
    return make(case.I, case.H, dtype=dtype, **arguments(case))


def theirs(case: Case, dtype: torch.dtype, seed: int = 1) -> nn.RNNBase:
    torch.manual_seed(seed)
    return LAYERS[case.mode][1](case.I, case.H, dtype=dtype, **arguments(case))


@dataclass(frozen=True)
class Data:
    """Input, initial state and cotangents of a case, all of one dtype and on one device.

    Attributes:
        x: ``[T, B, I]``, whatever the layout.
        lengths: ``[B]``, if packed.
        hx: ``[L*D, B, P or H]`` per state of the cell, or None.
        cotangents: of the output, ``[T, B, D*P]``, and of each final state.
    """

    x: Tensor
    lengths: Tensor | None
    hx: tuple[Tensor, ...] | None
    cotangents: tuple[Tensor, ...]

    def to(self, where: torch.dtype | str) -> Data:
        """As another dtype, or on another device."""

        def all_to(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.to(where) for t in tensors)

        hx = None if self.hx is None else all_to(self.hx)
        return replace(self, x=self.x.to(where), hx=hx, cotangents=all_to(self.cotangents))


def data(case: Case, dtype: torch.dtype, seed: int = 2) -> Data:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    lengths = None
    if case.packed:
        lengths = torch.randint(1, case.T + 1, (case.B,), generator=g)
        lengths[case.B // 2] = case.T
        if case.layout == "packed":
            lengths = lengths.sort(descending=True).values
    num_states = case.layers * case.directions
    states = [(num_states, case.B, case.H if k else case.P) for k in range(len(case.cell.states))]
    return Data(
        x=randn(case.T, case.B, case.I),
        lengths=lengths,
        hx=tuple(randn(*s) for s in states) if case.hx else None,
        cotangents=(
            randn(case.T, case.B, case.directions * case.P),
            *(randn(*s) for s in states),
        ),
    )


def shaped(case: Case, sequence: Tensor) -> Tensor:
    """A sequence ``[T, B, *]`` in the layout of this case."""
    if case.layout == "unbatched":
        return sequence.squeeze(1)
    return sequence.transpose(0, 1).contiguous() if case.layout == "batch_first" else sequence


def call(
    module: nn.Module, case: Case, x: Tensor, lengths: Tensor | None, hx: Any
) -> tuple[Tensor, ...]:
    """The output, padded where it is packed, and the final states."""
    input = x
    if lengths is not None:
        input = pack_padded_sequence(x, lengths, enforce_sorted=case.layout == "packed")
    if hx is not None and len(hx) == 1:
        (hx,) = hx
    output, final = module(input, hx)
    if lengths is not None:
        output, _ = pad_packed_sequence(output, total_length=case.T)
    return (output, *((final,) if isinstance(final, Tensor) else final))


def evaluate(module: nn.Module, case: Case, d: Data, backend: str | None = None) -> Results:
    """Outputs, and the gradients of every leaf that needs one. ``backend`` overrides the choice."""
    x = shaped(case, d.x.clone()).requires_grad_()
    squeeze = case.layout == "unbatched"
    hx = None
    if d.hx is not None:
        hx = tuple((s.squeeze(1) if squeeze else s).clone().requires_grad_() for s in d.hx)
    with nullcontext() if backend is None else fastrnn.use_backend(backend):
        outputs = call(module, case, x, d.lengths, hx)
    cotangents = [shaped(case, d.cotangents[0])]
    cotangents += [c.squeeze(1) if squeeze else c for c in d.cotangents[1:]]
    leaves = {"input": x, **dict(module.named_parameters())}
    leaves |= {f"{s}_0": t for s, t in zip(case.cell.states, hx or (), strict=False)}
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = dict(zip(output_names(case.cell), (o.detach() for o in outputs), strict=True))
    return results | {f"grad of {n}": g for n, g in zip(leaves, grads, strict=True)}


@lru_cache(maxsize=1024)
def reference_result(case: Case, dtype: torch.dtype, seed: int = 1) -> Results:
    """The results in float64 of ``ours(case, dtype, seed)`` on ``data(case, dtype, seed + 1)``.

    Computed once in a process: backends and tests share it, so callers leave it as it is.
    """
    module, d = ours(case, dtype, seed).double(), data(case, dtype, seed + 1)
    return evaluate(module, case, d.to(torch.float64), "reference")


def assert_matches_reference(
    case: Case, backend: str, dtype: torch.dtype, seed: int = 1
) -> Results:
    """Outputs and all gradients of a backend, near the reference in float64.

    Skips the test where the backend refuses the cell or the dtype.
    """
    if refusal := load_backend(backend).refuses(case.cell, dtype, torch.device("cpu")):
        pytest.skip(refusal)
    actual = evaluate(ours(case, dtype, seed), case, data(case, dtype, seed + 1), backend)
    for name, result in actual.items():
        assert result.dtype == dtype, name
    assert_near(actual, reference_result(case, dtype, seed), dtype)
    return actual


def output_names(cell: Cell) -> list[str]:
    return ["output", *(f"{s}_n" for s in cell.states)]


def assert_near(actual: Results, expected: Results, dtype: torch.dtype) -> None:
    """Every result within the tolerance of ``dtype``."""
    assert actual.keys() == expected.keys()
    tolerance = TOLERANCE[dtype]
    for name, e in expected.items():
        scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        torch.testing.assert_close(
            actual[name].to(e.dtype),
            e,
            rtol=tolerance.rtol,
            atol=tolerance.atol * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def errors(actual: Results, exact: Results) -> dict[str, float]:
    """The error of each result in the norm, relative to ``exact``."""
    assert actual.keys() == exact.keys()
    tiny = torch.finfo(torch.float64).tiny
    return {
        n: ((actual[n].double() - e).norm() / e.norm().clamp(min=tiny)).item()
        for n, e in exact.items()
    }


def assert_near_in_norm(actual: Results, exact: Results, max_error: float) -> None:
    """No result's error in the norm is more than ``max_error``.

    The error of an output is relative to the output. The error of a gradient is relative to the
    larger of the gradient and a tensor of its size with the mean square of all gradients, since a
    sum may cancel.
    """
    gradients = [e.flatten() for n, e in exact.items() if n.startswith("grad")]
    mean = torch.cat(gradients).square().mean().sqrt().item()
    for name, error in errors(actual, exact).items():
        e = exact[name]
        scale = e.norm().item()
        if name.startswith("grad") and scale < mean * e.numel() ** 0.5:
            error *= scale / (mean * e.numel() ** 0.5)
        assert error <= max_error, f"{name}: {error:.1e}"


def assert_as_accurate(
    actual: Sequence[dict[str, float]], baseline: Sequence[dict[str, float]]
) -> None:
    """Over several calls, no result's error is more than twice the error of torch.nn."""
    for name in actual[0]:
        error, own = (
            (sum(e[name] ** 2 for e in calls) / len(calls)) ** 0.5 for calls in (actual, baseline)
        )
        assert error <= 2 * own, f"{name}: error {error:.2e}, torch.nn's {own:.2e}"


def assert_equal(actual: Results, expected: Results) -> None:
    """Every result equal, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        assert torch.equal(actual[name], e), name


def run_python(
    code: str, directory: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, with no fastrnn setting but the given ones.

    A process that hangs fails the test, and is killed together with its children.
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTRNN_")}
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=100)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def run_script(code: str, directory: Path | None = None, **environment: str) -> str:
    """The output of code that runs in a new process and must succeed."""
    run = run_python(code, directory, **environment)
    assert run.returncode == 0, f"{run.returncode}: {run.stderr}"
    return run.stdout.strip()

"""Wrong arguments, strange views, and sizes at the limits: an error or the right result."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYERS, STEPS, runnable
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.dispatch import load_backend

pytestmark = pytest.mark.contract

MODES = list(LAYERS)


def leaves(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for r in result for t in leaves(r)]


# Packed batches that pack_padded_sequence never makes

BATCH_SIZES = {
    "too many rows": torch.tensor([3, 2, 2]),
    "too few rows": torch.tensor([3, 2]),
    "increasing": torch.tensor([2, 3, 1]),
    "zero": torch.tensor([3, 3, 0]),
    "all zero": torch.tensor([0, 0]),
    "negative": torch.tensor([4, 3, -1]),
    "first negative": torch.tensor([-1, 7]),
    "float": torch.tensor([3.0, 2.0, 1.0]),
    "nan": torch.tensor([float("nan"), 3.0]),
    "int32": torch.tensor([3, 2, 1], dtype=torch.int32),
    "bool": torch.tensor([True, True]),
    "2-D": torch.tensor([[3, 2, 1]]),
    "0-D": torch.tensor(6),
    "empty": torch.tensor([], dtype=torch.int64),
    "sum that overflows": torch.tensor([2**62, 2**62, 2**62, 2**62 + 6]),
    "huge": torch.tensor([2**62, 6]),
}


@pytest.mark.parametrize("name", BATCH_SIZES)
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_broken_batch_sizes(name: str, with_hx: bool, training: bool) -> None:
    packed = PackedSequence(torch.randn(6, 3), BATCH_SIZES[name])
    m = fastrnn.GRU(3, 4).requires_grad_(training)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)expected"):
        m(packed, torch.randn(1, 3, 4) if with_hx else None)


@pytest.mark.parametrize("which", ["sorted", "unsorted"])
@pytest.mark.parametrize("bad", [[2, 0, 9], [2, 0, -4], [2, 0]])
def test_broken_permutations(which: str, bad: list[int]) -> None:
    order = {"sorted": torch.tensor([2, 0, 1]), "unsorted": torch.tensor([1, 2, 0])}
    order[which] = torch.tensor(bad)
    packed = PackedSequence(
        torch.randn(6, 3), torch.tensor([3, 2, 1]), order["sorted"], order["unsorted"]
    )
    for m in (fastrnn.GRU(3, 4), nn.GRU(3, 4)):
        if which == "unsorted" and len(bad) == 2:
            assert m(packed, torch.randn(1, 3, 4))[1].shape == (1, 2, 4)  # a choice of sequences
        else:
            with pytest.raises(RuntimeError):
                m(packed, torch.randn(1, 3, 4))


def test_lengths_that_torch_refuses_to_pack() -> None:
    x = torch.randn(3, 2, 3)
    for lengths in ([float("nan"), 1.0], [1, 0], [1, -1]):
        with pytest.raises(RuntimeError):
            fastrnn.GRU(3, 4)(pack_padded_sequence(x, lengths))


def test_packed_rows_of_a_wrong_shape() -> None:
    m = fastrnn.LSTM(3, 4)
    for shape in ((6,), (6, 1, 3), (6, 5), (6, 0)):
        with pytest.raises(RuntimeError, match="got"):
            m(PackedSequence(torch.randn(shape), torch.tensor([3, 2, 1])))


# Arguments of a wrong type

NOT_HX: dict[str, Any] = {
    "int": 5,
    "str": "hc",
    "dict": {"h": torch.zeros(1, 2, 4)},
    "numpy": torch.zeros(1, 2, 4).numpy(),
    "empty tuple": (),
    "three": (torch.zeros(1, 2, 4),) * 3,
    "of None": (None, None),
    "of int": (torch.zeros(1, 2, 4), 5),
    "iterator": iter([torch.zeros(1, 2, 4)] * 2),
}


@pytest.mark.parametrize("name", NOT_HX)
@pytest.mark.parametrize("mode", MODES)
def test_hx_of_a_wrong_type(mode: str, name: str) -> None:
    x = torch.randn(5, 2, 3)
    for table, inputs in ((LAYERS, (x, x[:, 0], pack_sequence([x[:, 0]]))), (STEPS, (x[0],))):
        for input in inputs:
            with pytest.raises(TypeError, match=r"expected hx to .*got|expected hx to hold"):
                table[mode][0](3, 4)(input, NOT_HX[name])


@pytest.mark.parametrize("mode", MODES)
def test_one_hx_where_another_cell_has_two(mode: str) -> None:
    h = torch.randn(1, 2, 4)
    wrong = h if mode == "LSTM" else (h, h)
    with pytest.raises(TypeError, match="expected hx to be a"):
        LAYERS[mode][0](3, 4)(torch.randn(5, 2, 3), wrong)
    with pytest.raises(TypeError, match="expected hx to be a"):
        STEPS[mode][0](3, 4)(torch.randn(2, 3), h[0] if mode == "LSTM" else (h[0], h[0]))


@pytest.mark.parametrize("input", [None, 5, [torch.zeros(2, 3)], torch.zeros(5, 2, 3).numpy()])
def test_input_of_a_wrong_type(input: Any) -> None:
    for m in (fastrnn.GRU(3, 4), fastrnn.GRUCell(3, 4)):
        with pytest.raises(TypeError, match=r"expected a Tensor.*, got"):
            m(input)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["input", "hx", "module"])
@pytest.mark.usefixtures("automatic")
def test_devices_mixed(mode: str, what: str) -> None:
    for table, x, h in (
        (LAYERS, torch.randn(5, 2, 3), torch.randn(1, 2, 4)),
        (STEPS, torch.randn(2, 3), torch.randn(2, 4)),
    ):
        m = table[mode][0](3, 4)
        if what == "module":
            m.to("meta")
        elif what == "input":
            x = x.to("meta")
        else:
            h = h.to("meta")
        with pytest.raises(RuntimeError, match=r"on the input's device .*got .* on"):
            m(x, (h, h) if mode == "LSTM" else h)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("mode", MODES)
def test_input_that_is_not_floating_point(mode: str, dtype: torch.dtype) -> None:
    x = torch.ones(5, 2, 3).to(dtype)
    for table, input in ((LAYERS, x), (STEPS, x[0])):
        for m in (make(3, 4) for make in table[mode]):
            # torch before 2.13 writes "type".
            with pytest.raises((ValueError, RuntimeError), match="type"):
                m(input)


@pytest.mark.parametrize("layout", ["sparse", "sparse hx", "mkldnn"])
def test_tensors_without_strides(layout: str) -> None:
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    if layout == "mkldnn":
        x = x.to_mkldnn()
    elif layout == "sparse":
        x = x.to_sparse()
    else:
        h = h.to_sparse()
    with pytest.raises(RuntimeError, match=r"layout torch.strided|plain strides"):
        fastrnn.GRU(3, 4)(x, h)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("x, h", [((1, 3), (4,)), ((3,), (1, 4)), ((3,), (2, 4)), ((2, 3), (4,))])
def test_a_cells_state_of_another_rank(mode: str, x: tuple[int, ...], h: tuple[int, ...]) -> None:
    for m in (make(3, 4) for make in STEPS[mode]):
        hx = (torch.randn(h),) * 2 if mode == "LSTM" else torch.randn(h)
        with pytest.raises(RuntimeError):
            m(torch.randn(x), hx)


@pytest.mark.parametrize("mode", MODES)
def test_a_cell_without_features(mode: str) -> None:
    """torch.nn's cells take input_size=0, and only its cells."""
    mine, torchs = (make(0, 4) for make in STEPS[mode])
    torchs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 0)
    torch.testing.assert_close(leaves(mine(x)), leaves(torchs(x)))
    sum(t.sum() for t in leaves(mine(x))).backward()
    assert mine.weight_ih.grad.shape == mine.weight_ih.shape
    with pytest.raises(RuntimeError, match="hidden_size above 0"):
        STEPS[mode][0](3, 0)(torch.randn(2, 3))


# Weights that the user replaced

BAD_WEIGHTS: dict[str, tuple[str, Tensor]] = {
    "features": ("weight_ih_l0", torch.randn(12, 5)),
    "rows": ("weight_ih_l0", torch.randn(11, 3)),
    "one gate": ("weight_ih_l0", torch.randn(4, 3)),
    "transposed": ("weight_ih_l0", torch.randn(3, 12)),
    "hidden size": ("weight_hh_l0", torch.randn(12, 5)),
    "all of another hidden size": ("weight_hh_l0", torch.randn(24, 8)),
    "no rows": ("weight_hh_l0", torch.randn(0, 4)),
    "no columns": ("weight_hh_l0", torch.randn(12, 0)),
    "nothing": ("weight_hh_l0", torch.randn(0, 0)),
    "1-D": ("weight_hh_l0", torch.randn(48)),
    "3-D": ("weight_hh_l0", torch.randn(12, 4, 1)),
    "0-D": ("weight_hh_l0", torch.tensor(1.0)),
    "short bias": ("bias_ih_l0", torch.randn(4)),
    "bias of one": ("bias_hh_l0", torch.randn(1)),
    "2-D bias": ("bias_hh_l0", torch.randn(12, 1)),
    "bias with a row": ("bias_ih_l0", torch.randn(1, 12)),
    "float64": ("weight_hh_l0", torch.randn(12, 4).double()),
    "float64 bias": ("bias_hh_l0", torch.randn(12).double()),
    "int": ("weight_hh_l0", torch.ones(12, 4, dtype=torch.int64)),
    "meta": ("weight_hh_l0", torch.randn(12, 4, device="meta")),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_weights(name: str, training: bool) -> None:
    attribute, value = BAD_WEIGHTS[name]
    x = torch.randn(5, 2, 3, requires_grad=training)
    layer, cell = fastrnn.GRU(3, 4), fastrnn.GRUCell(3, 4)
    for m, key, input in ((layer, attribute, x), (cell, attribute[:-3], x[0])):
        m.requires_grad_(training)
        setattr(m, key, nn.Parameter(value, requires_grad=False))
        with pytest.raises((RuntimeError, ValueError), match=r"expected .*got"):
            m(input)


@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0", "weight_hh_l0"])
def test_a_weight_set_to_none(name: str) -> None:
    m = fastrnn.GRU(3, 4)
    setattr(m, name, None)
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        m(torch.randn(5, 2, 3))


# Views

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed layout": lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "every other": lambda t: t.repeat_interleave(2, 2)[..., ::2],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "expanded features": lambda t: t[..., :1].expand_as(t),
    "expanded batch": lambda t: t[:, :1].expand_as(t),
    "expanded time": lambda t: t[:1].expand_as(t),
    "expanded all": lambda t: t[:1, :1, :1].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (2, 1, 1)),
    "flipped": lambda t: t.flip(0),
    "narrowed": lambda t: torch.cat([t, t, t], 2)[..., t.shape[2] : 2 * t.shape[2]],
    "conjugate": lambda t: torch.complex(t, t).conj().real,
    "negative bit": lambda t: torch.complex(t, -t).conj().imag,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", MODES)
def test_views(mode: str, view: str) -> None:
    """A view as input, state, cotangent or packed rows gives the results of its copy."""
    make = VIEWS[view]
    m = LAYERS[mode][0](3, 4)
    x0, h0, g0 = (torch.randn(s) for s in ((6, 5, 3), (1, 5, 4), (6, 5, 4)))
    results = []
    for prepare in (lambda t: make(t), lambda t: make(t).clone().contiguous()):
        base, hbase = x0.clone().requires_grad_(), h0.clone().requires_grad_()
        x, h, g = prepare(base), prepare(hbase), prepare(g0)
        output, final = m(x, (h, h) if mode == "LSTM" else h)
        packed = PackedSequence(prepare(base)[:, 0], torch.tensor([3, 2, 1]))
        rows = m(packed)[0].data
        grads = torch.autograd.grad([output, rows], [base, hbase, *m.parameters()], [g, g[:, 0]])
        results.append([output, *leaves(final), rows, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_a_view(mode: str, backend: str) -> None:
    cell = STEPS[mode][0](3, 4)
    x, h = torch.randn(3, 5).t(), torch.randn(1, 4).expand(5, 4)
    copies = x.contiguous(), h.contiguous()
    with fastrnn.use_backend(backend):
        result = leaves(cell(x, (h, h) if mode == "LSTM" else h))
        expected = leaves(cell(copies[0], copies[1:] * 2 if mode == "LSTM" else copies[1]))
    for a, b in zip(result, expected, strict=True):
        # Products outside the engine may sum in an order that depends on strides.
        assert torch.equal(a, b) if backend == "cpp" else torch.allclose(a, b, 1e-6, 1e-6)


def test_a_state_that_is_also_the_input() -> None:
    m = fastrnn.GRU(4, 4)
    x = torch.randn(1, 2, 4)
    before = x.clone()
    output, _ = m(x, x)
    assert torch.equal(x, before)
    assert torch.equal(output, m(x, x.clone())[0])


# fastrnn raises exactly when torch.nn does, and the same type

DIMS = st.sampled_from([0, 1, 2, 3, 4, 5])
DTYPES = st.sampled_from([torch.float32] * 5 + [torch.float64, torch.int64])


@st.composite
def tensors(draw: st.DrawFn, usual: tuple[int, ...]) -> tuple[tuple[int, ...], torch.dtype]:
    """The usual shape, the usual shape with one other size, or any shape; and a dtype."""
    shape = list(usual)
    how = draw(st.integers(0, 3))
    if how == 2 and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(DIMS)
    elif how == 3:
        shape = draw(st.lists(DIMS, max_size=4))
    return tuple(shape), draw(DTYPES)


def outcome(f: Callable[[], Any]) -> list[Tensor] | type[Exception]:
    try:
        return leaves(f())
    except Exception as error:
        return type(error)


def assert_same_outcome(modules: tuple[nn.Module, nn.Module], *args: Any) -> None:
    mine, torchs = (outcome(lambda m=m: m(*args)) for m in modules)
    if torchs is IndexError:
        torchs = RuntimeError  # torch's check of a 1-D hx fails on its way to that message
    if isinstance(torchs, type) or isinstance(mine, type):
        assert mine is torchs
        return
    for a, b in zip(mine, torchs, strict=True):
        torch.testing.assert_close(a, b)


def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (
        torch.ones(shape, dtype=dtype) * 0.5
        if dtype.is_floating_point
        else torch.ones(shape).to(dtype)
    )


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_raises_when_torchs_does(mode: str, data: st.DataObject) -> None:
    layers, directions = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    kwargs = {"num_layers": layers, "bidirectional": directions == 2}
    kwargs |= {"batch_first": data.draw(st.booleans())}
    modules = tuple(make_layer(3, 4, **kwargs) for make_layer in LAYERS[mode])
    modules[0].load_state_dict(modules[1].state_dict())
    batched = data.draw(st.booleans())
    x = make(*data.draw(tensors((5, 2, 3) if batched else (5, 3))))
    B = (5 if kwargs["batch_first"] else 2,) if batched else ()
    hx = None
    if data.draw(st.booleans()):
        states = [
            make(*data.draw(tensors((layers * directions, *B, 4))))
            for _ in range(1 + (mode == "LSTM"))
        ]
        hx = tuple(states) if mode == "LSTM" else states[0]
    assert_same_outcome(modules, x, hx)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
@pytest.mark.parametrize("mode", MODES)
def test_a_cell_raises_when_torchs_does(mode: str, data: st.DataObject) -> None:
    modules = tuple(make_cell(3, 4) for make_cell in STEPS[mode])
    modules[0].load_state_dict(modules[1].state_dict())
    B = (2,) if data.draw(st.booleans()) else ()
    x = make(*data.draw(tensors((*B, 3))))
    hx = None
    if data.draw(st.booleans()):
        hx = make(*data.draw(tensors((*B, 4))))
        if mode == "LSTM":
            shape, _ = data.draw(tensors((*B, 4)))
            hx = hx, make(shape, hx.dtype)  # torch promotes where c alone has another dtype
    assert_same_outcome(modules, x, hx)


# Random arguments


PUBLIC = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Fuzz:
    """Mostly valid arguments, of sizes T=5, B=2, I=3 and H=4."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.infinite = False
        torch.manual_seed(seed)

    def once_in(self, n: int) -> bool:
        return self.draw.random() < 1 / n

    def tensor(self, *shape: int) -> Any:
        draw, sizes = self.draw, list(shape)
        if self.once_in(50):
            return draw.choice([None, 3, 0.5, "a", [1.0], [[0.5] * 3] * 2, (), object(), {}])
        if self.once_in(8) and sizes:
            sizes[draw.randrange(len(sizes))] = draw.randrange(7)
        if self.once_in(15):
            sizes = [draw.randrange(6) for _ in range(draw.randrange(5))]
        t = torch.randn([2 * n for n in sizes] if (sliced := self.once_in(8)) else sizes)
        if t.numel() and self.once_in(5):
            for _ in range(draw.randrange(1, 4)):
                value = draw.choice([math.nan, math.nan, math.inf, -math.inf, -0.0, 1e-40])
                self.infinite |= math.isinf(value)
                t.view(-1)[draw.randrange(t.numel())] = value
        if sliced:
            t = t[tuple(slice(None, None, 2) for _ in sizes)]
        if self.once_in(10) and t.dim() > 1:
            t = t.transpose(0, 1).contiguous().transpose(0, 1)
        if self.once_in(20):
            t = t[..., :1].expand(t.shape) if t.dim() else t
        if self.once_in(10):
            dtypes = (torch.float64, torch.int64, torch.bool, torch.cfloat, torch.bfloat16)
            t = t.nan_to_num().to(draw.choice(dtypes))
        if self.once_in(30):
            t = draw.choice([t.to("meta"), t.to_sparse(), t.float().numpy(), t.tolist()])
        if isinstance(t, Tensor) and t.is_floating_point() and self.once_in(3):
            t.requires_grad_()
        return t

    def module(self, names: tuple[str, ...]) -> nn.Module:
        draw, name = self.draw, self.draw.choice(names)
        options: dict[str, Any] = {}
        if "Cell" not in name:
            options = {"num_layers": draw.choice([1, 2]), "bidirectional": self.once_in(2)}
            options |= {"batch_first": self.once_in(2)}
            if name == "LSTM" and self.once_in(4):
                options["proj_size"] = 2
        return getattr(fastrnn, name)(3, 4, **options).train(self.once_in(2))

    def state(self, m: Any, batch: tuple[int, ...]) -> Any:
        if self.once_in(2):
            return None
        rows = () if "Cell" in type(m).__name__ else (m.num_layers * (1 + m.bidirectional),)
        if not type(m).__name__.startswith("LSTM"):
            return self.tensor(*rows, *batch, 4)
        hx = [self.tensor(*rows, *batch, getattr(m, "proj_size", 0) or 4)]
        hx += [self.tensor(*rows, *batch, 4)] * (not self.once_in(20))
        return hx if self.once_in(4) else tuple(hx)

    def lengths(self) -> Any:
        if self.once_in(10):
            return self.draw.choice([[], [1], [6, 1], [-1, 2], [1.5, 2], ["a", 1], 3, [None, 1]])
        numbers = [self.draw.randrange(6) for _ in range(2)]
        return torch.tensor(numbers) if self.once_in(2) else numbers

    def layer(self) -> Callable[[], Any]:
        m: Any = self.module(("RNN", "LSTM", "GRU"))
        batched = not self.once_in(4)
        sizes = (2, 5) if m.batch_first else (5, 2)
        x = self.tensor(*(sizes if batched else (5,)), 3)
        hx = self.state(m, (2,) if batched else ())
        if self.once_in(4):
            lengths = self.lengths()
            return lambda: m(x, hx, lengths=lengths)
        if self.once_in(4):
            batch_sizes: Any = self.draw.choice([[2, 2, 1], [2, 1, 1, 1], [1, 2], [3], [], [0]])
            batch_sizes = torch.tensor(
                batch_sizes, dtype=self.draw.choice([torch.int64] * 5 + [torch.float32])
            )
            order = torch.tensor(self.draw.choice([[0, 1], [1, 0], [0, 2], [0], [-1, 0]]))
            packed = PackedSequence(self.tensor(5, 3), batch_sizes, order, order)
            return lambda: m(packed, hx)
        return lambda: m(x, hx)

    def cell(self) -> Callable[[], Any]:
        m = self.module(("RNNCell", "LSTMCell", "GRUCell"))
        batch = (2,) if not self.once_in(3) else ()
        x, hx = self.tensor(*batch, 3), self.state(m, batch)
        return lambda: m(x, hx)

    def constructor(self) -> Callable[[], Any]:
        values = [1, 2, 3, -1, 0, 2**40, 2**62, 1.5, None, "3", "relu", True, math.nan, [], 2**70]
        cls = getattr(fastrnn, self.draw.choice([*PUBLIC, "RNNBase"]))
        names = ["num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"]
        names += ["device", "dtype", "nonlinearity", "surprise"]
        args = [self.draw.choice(values) for _ in range(self.draw.randrange(3))]
        chosen = self.draw.sample(names, self.draw.randrange(4))
        # Very many layers would be made one by one.
        kwargs = {n: self.draw.choice(values[:5] + values[7:-1]) for n in chosen}
        return lambda: cls(*args, **kwargs)

    def function(self) -> Callable[[], Any]:
        draw, m = self.draw, self.module(PUBLIC)
        others = (nn.LSTM(3, 4), nn.RNNCell(3, 4, nonlinearity="sigmoid"), None, 3, "a")
        thing = m if self.once_in(2) else draw.choice([*others, m.state_dict()])
        x, hx = self.tensor(5, 2, 3), self.tensor(1, 2, 4)
        number = draw.choice([1, 2, 3, 20, 0, -1, 0.5, None, "a", [1], math.nan, 2**40])
        dim = draw.choice([0, 1, -1, 7, None, "a"])
        name = draw.choice(PUBLIC)
        init = draw.choice(["chrono_", "forget_bias_", "identity_", "orthogonal_"])

        def step(*windows: Any) -> tuple[Any, Any]:
            return windows[0] * 2, windows[-1]

        def patched() -> Any:
            with fastrnn.patched():
                return getattr(nn, name)(3, 4)(x)

        return draw.choice(
            [
                patched,
                lambda: getattr(fastrnn.init, init)(thing, number),
                lambda: [y for y, _ in fastrnn.tbptt(step, (x, x), number, hx, dim=dim)],
                lambda: [y for y, _ in fastrnn.tbptt(step, thing, number, hx, dim=dim)],
                lambda: fastrnn.diagnostics.gradient_flow(thing, x, hx),
                lambda: fastrnn.explain(thing, x),
                lambda: fastrnn.convert(thing),
                lambda: fastrnn.revert(thing),
                lambda: fastrnn.use_backend(thing).__enter__(),
                fastrnn.empty_cache,
            ]
        )

    def call(self) -> Callable[[], Any]:
        kinds = (self.layer, self.cell, self.constructor, self.function)
        call, autocast = self.draw.choices(kinds, (6, 3, 1, 1))[0](), self.once_in(6)

        def under() -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return call()

        return under


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "seeds",
    [range(1, 501), range(501, 1001), pytest.param(range(1001, 20_001), marks=pytest.mark.heavy)],
    ids=str,
)
def test_any_arguments(seeds: range) -> None:
    """A result that can be differentiated, with NaN where the reference has it, or an error."""
    worked = 0
    for seed in seeds:
        fuzz = Fuzz(seed)
        call = fuzz.call()
        try:
            results = [t for t in tree_leaves(call()) if isinstance(t, Tensor)]
        except (ValueError, RuntimeError, TypeError):
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
        worked += bool(results)
        torch.manual_seed(0)
        if differentiable := [t for t in results if t.requires_grad]:
            torch.autograd.backward(differentiable, [torch.randn_like(t) for t in differentiable])
        with fastrnn.use_backend("reference"):
            expected = [t for t in tree_leaves(call()) if isinstance(t, Tensor)]
        for a, e in zip(results, expected, strict=True):
            assert a.layout is torch.strided, f"seed {seed}"
            if a.is_meta:
                continue
            assert not (a.isnan() & ~e.isnan()).any(), f"seed {seed}"
            # A sigmoid of minus infinity is as small as may be, but not zero.
            assert fuzz.infinite or torch.equal(a.isnan(), e.isnan()), f"seed {seed}"
    assert worked > len(seeds) / 4


# Sizes


@pytest.mark.heavy
def test_more_than_2_to_the_31_values_of_gates() -> None:
    """33.6 million rows, 2 GiB of output: every byte offset in it beyond 32 bits."""
    T, B, H = 2**15, 1025, 16
    assert T * B * 4 * H > 2**31
    m = fastrnn.LSTM(1, H)
    x = torch.randn(T, B, 1)
    with torch.no_grad():
        output, (h, c) = m(x)
        few = [0, 1, 512, B - 1]
        expected, (h_few, c_few) = m(x[:, few])
    for a, b in ((output[:, few], expected), (h[:, few], h_few), (c[:, few], c_few)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert output[-100:].isfinite().all()


@pytest.mark.heavy
def test_a_backward_over_more_than_2_to_the_31_bytes() -> None:
    T, B, H = 2**12, 2049, 16
    assert T * B * 4 * H * 4 > 2**31
    m = fastrnn.LSTM(1, H)
    x = torch.randn(T, B, 1, requires_grad=True)
    m(x)[0].sum().backward()
    few = [0, 1, 1024, B - 1]
    expected = x.detach()[:, few].requires_grad_()
    m(expected)[0].sum().backward()
    torch.testing.assert_close(x.grad[:, few], expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2**21, 2**31])
def test_an_input_too_large_to_exist(size: int) -> None:
    """An expanded view takes no memory; its copy would."""
    m = fastrnn.RNN(1, 1)
    x = torch.zeros(1, 1, 1).expand(size, size, 1)
    with pytest.raises(RuntimeError), torch.no_grad():
        m(x)


# The extension's own functions


def test_the_extension_survives_wrong_arguments() -> None:
    """In another process, since the failure would be a crash."""
    if load_backend("cpp").missing() is not None:
        pytest.skip("no extension")
    script = Path(__file__).with_name("fuzz_extension.py")
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-3000:]}"
    assert re.search(r"^backward: \d+ taken, \d{4,} refused$", result.stdout, re.M)


def test_a_block_that_no_address_range_holds() -> None:
    cpp = pytest.importorskip("fastrnn._cpp")
    for size in (2**64 - 1, 2**63):
        with pytest.raises(MemoryError):
            cpp.Scratch(size)


def test_backward_of_an_empty_batch_with_a_strided_state() -> None:
    m = fastrnn.GRU(3, 4)
    m(torch.zeros(5, 0, 3), torch.zeros(1, 0, 8)[..., ::2])[0].sum().backward()
    assert all(p.grad.eq(0).all() for p in m.parameters())


class ByMethods:
    """A tensor with methods only and without DLPack's C functions, as before torch 2.10."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def test_tensors_read_by_their_methods() -> None:
    cpp = pytest.importorskip("fastrnn._cpp")
    m, x = fastrnn.RNN(7, 5), torch.randn(4, 3, 7)
    w_ih, *others = (p.detach() for p in m.parameters())

    def run(x: Tensor, w: Tensor) -> Tensor:
        weights = (ByMethods(w), *map(ByMethods, others), None)
        return cpp.forward(cpp.isas()[0], 0, 1, True, None, ByMethods(x), (weights,), None, False)[
            0
        ]

    torch.testing.assert_close(run(x, w_ih), m(x)[0])
    w = w_ih
    for wrong in (w.half(), w.double(), w[:-1], w.to(torch.complex64), w.to("meta"), w.flatten()):
        with pytest.raises(ValueError, match="expected"):
            run(x, wrong)


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("mode", MODES)
def test_a_lazy_minus_sign(mode: str, backend: str) -> None:
    m = LAYERS[mode][0](3, 4)
    x, h, g = torch.randn(6, 5, 3), torch.randn(1, 5, 4), torch.randn(6, 5, 4)
    results = []
    for negate in (torch._neg_view, torch.neg):
        xn, hn = negate(x).requires_grad_(), negate(h).requires_grad_()
        with fastrnn.use_backend(backend):
            output, final = m(xn, (hn, hn) if mode == "LSTM" else hn)
        grads = torch.autograd.grad(output, [xn, hn, *m.parameters()], negate(g))
        results.append([output, *leaves(final), *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [b for b in (*runnable(), "reference") if b != "cpp"])
def test_lazy_zeros(backend: str) -> None:
    m, x = fastrnn.GRU(3, 16), torch.randn(6, 5, 3, requires_grad=True)
    with fastrnn.use_backend(backend):
        y, _ = m(x)
    (dx,) = torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape))
    assert torch.equal(dx, torch.zeros_like(x))


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("change", [torch.Tensor.half, lambda t: t[..., :-1], lambda t: t.mT])
def test_changed_saved_activations(change: Callable[[Any], Any], backend: str) -> None:
    def unpack(t: torch.Tensor) -> torch.Tensor:
        return change(t) if t.dim() == 4 else t

    m, x = fastrnn.LSTM(3, 16), torch.randn(6, 5, 3)
    with (
        fastrnn.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack),
    ):
        y, _ = m(x)
    with pytest.raises((RuntimeError, ValueError), match="expected"):
        y.sum().backward()


@pytest.mark.parametrize("backend", runnable())
def test_a_weight_that_grew_unknown_to_autograd(backend: str) -> None:
    m, x = fastrnn.GRU(3, 16), torch.randn(6, 5, 3)
    with fastrnn.use_backend(backend):
        y, _ = m(x)
    m.weight_hh_l0.data = torch.randn(3 * 64, 64)
    with pytest.raises((RuntimeError, ValueError)):
        y.sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("automatic")
def test_a_complex_layer_is_refused(mode: str) -> None:
    m = LAYERS[mode][0](3, 4, dtype=torch.complex64)
    with pytest.raises(fastrnn.BackendError, match="real floating-point dtype"):
        m(torch.zeros(5, 2, 3, dtype=torch.complex64))


def test_explain_checks_the_input() -> None:
    for m in (fastrnn.GRU(4, 6).bfloat16(), fastrnn.GRUCell(4, 6).bfloat16()):
        with pytest.raises((ValueError, RuntimeError), match="dtype"):
            fastrnn.explain(m, torch.zeros(5, 4))
        with pytest.raises(TypeError, match="got NoneType"):
            fastrnn.explain(m, None)

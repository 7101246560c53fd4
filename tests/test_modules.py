"""torch.nn's contract: construction, state, shapes, errors, copies; weights read at call time."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    CASES,
    LAYERS,
    STEPS,
    Case,
    arguments,
    call,
    data,
    evaluate,
    ours,
    run_script,
    runnable,
    theirs,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn

pytestmark = pytest.mark.contract

Pair = tuple[nn.Module, nn.Module]


@pytest.fixture(autouse=True)
def not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual setting, in which the C++ engine multiplies few rows in another way."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)


KNOWN = [c for c in CASES if c.mode in LAYERS]
MODES = list(LAYERS)


def pair(table: dict[str, Any], mode: str, *args: Any, **kwargs: Any) -> Pair:
    """Ours and theirs, built from one seed."""
    modules = []
    for make in table[mode]:
        torch.manual_seed(1)
        modules.append(make(*args, **kwargs))
    return tuple(modules)


fast = pytest.mark.parametrize("backend", runnable())
layers = partial(pair, LAYERS)
steps = partial(pair, STEPS)


def states(mode: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    hx = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    return tuple(hx) if mode == "LSTM" else hx[0]


def flat(result: Any) -> list[Tensor]:
    """The tensors in what a layer or a cell returns."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def assert_same(mine: Any, torchs: Any) -> None:
    for a, b in zip(flat(mine), flat(torchs), strict=True):
        torch.testing.assert_close(a, b, check_stride=True)


def outcome(f: Callable[[], Any]) -> type[BaseException] | None:
    """The type of the exception that ``f`` raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            f()
        except Exception as error:
            return type(error)
    return None


# Construction

BAD_ARGUMENTS = [
    {"dropout": None},
    {"dropout": "a"},
    {"dropout": "0.5"},
    {"dropout": True},
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"dropout": 1 + 0j},
    {"dropout": float("nan")},
    {"bias": 1},
    {"bias": None},
    {"batch_first": 0},
    {"input_size": 2.0},
    {"input_size": "2"},
    {"input_size": 0},
    {"input_size": -3},
    {"hidden_size": 2.0},
    {"hidden_size": None},
    {"hidden_size": 0},
    {"hidden_size": -3},
    {"num_layers": 0},
    {"num_layers": -1},
    {"num_layers": 1.5},
    {"num_layers": "2"},
    {"proj_size": -1},
    {"proj_size": 4},
    {"proj_size": 9},
    {"proj_size": "2"},
    {"dtype": torch.int64},
    {"device": "nowhere"},
    {"unknown": 3},
]


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13),
    reason="the order of the checks is that of torch 2.13",
)
@pytest.mark.parametrize("mode", MODES)
def test_constructor_refuses_what_torch_refuses_in_its_order(mode: str) -> None:
    mine, torchs = LAYERS[mode]
    for a, b in [(a, a) for a in BAD_ARGUMENTS] + list(combinations(BAD_ARGUMENTS, 2)):
        kwargs = {"input_size": 3, "hidden_size": 4} | a | b
        expected = outcome(lambda kwargs=kwargs: torchs(**kwargs))
        assert expected is not None, kwargs
        assert outcome(lambda kwargs=kwargs: mine(**kwargs)) is expected, kwargs


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("RNN", (3, 4, 1, "sigmoid"), {}),
        ("RNN", (3, 4), {"nonlinearity": None}),
        ("RNN", (3, 4, 1, "relu"), {"nonlinearity": "relu"}),
        ("RNN", (3, 4), {"proj_size": 0}),
        ("GRU", (3, 4), {"proj_size": 0}),
        ("GRU", (3, 4), {"nonlinearity": "relu"}),
        ("LSTM", (3,), {}),
        ("LSTM", (3, 4, 1, True, False, 0.0, False, 4), {}),
        ("RNNBase", ("ELMAN", 3, 4), {}),
    ],
)
def test_constructor_refuses(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected = outcome(lambda: getattr(nn, name)(*args, **kwargs))
    assert expected is not None
    assert outcome(lambda: getattr(fastrnn, name)(*args, **kwargs)) is expected


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("RNN", (3, 4, 2, "relu", False, True, 0.5, True)),
        ("RNN", (3, 4, 2)),
        ("LSTM", (3, 4, 2, False, True, 0.5, True, 2)),
        ("GRU", (3, 4, 2, False, True, 0.5, True)),
        ("RNN", (True, 4)),
        ("LSTM", (3, 4, 2, True, False, 0, "yes")),
        ("RNNCell", (3, 4, False, "relu")),
        ("LSTMCell", (3, 4, False)),
        ("GRUCell", (3, 4, 1)),
    ],
)
def test_positional_arguments(name: str, args: tuple[Any, ...]) -> None:
    mine, torchs = getattr(fastrnn, name)(*args), getattr(nn, name)(*args)
    assert repr(mine) == repr(torchs)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {
        k: v.shape for k, v in torchs.state_dict().items()
    }


def test_dropout_of_a_single_layer_warns() -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        fastrnn.LSTM(3, 4, dropout=0.5)


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_parameters_and_attributes_are_torchs(case: Case) -> None:
    after = []
    modules = []
    for make in (ours, theirs):
        modules.append(make(case, torch.float32))
        after.append(torch.get_rng_state())
    mine, torchs = modules
    assert torch.equal(*after)
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in torchs.named_parameters()]
    for a, b in zip(mine.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(a, b)
    names = {n for n in torchs.__dict__ if not n.startswith("_")}
    names |= {"_flat_weights_names", "_all_weights", "__constants__"}
    for name in names:
        assert getattr(mine, name) == getattr(torchs, name), name
    for a, b in zip(mine.all_weights, torchs.all_weights, strict=True):
        assert_same(a, b)
    assert_same(mine._flat_weights, torchs._flat_weights)
    assert repr(mine) == repr(torchs)
    assert mine.extra_repr() == torchs.extra_repr()


@pytest.mark.parametrize("mode", MODES)
def test_no_public_name_is_lacking(mode: str) -> None:
    for mine, torchs in (layers(mode, 3, 4), steps(mode, 3, 4)):
        assert {n for n in dir(torchs) if not n.startswith("_")} <= set(dir(mine))


@pytest.mark.parametrize("mode", MODES)
def test_reset_parameters(mode: str) -> None:
    for mine, torchs in (layers(mode, 3, 4, num_layers=2), steps(mode, 3, 4)):
        for m in (mine, torchs):
            torch.manual_seed(7)
            m.reset_parameters()
        assert_same(list(mine.parameters()), list(torchs.parameters()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_cell_attributes_are_torchs(mode: str, bias: bool) -> None:
    mine, torchs = steps(mode, 3, 4, bias=bias)
    assert list(mine.state_dict()) == list(torchs.state_dict())
    assert mine._parameters.keys() == torchs._parameters.keys()
    assert (mine.bias_ih is None) is (not bias)
    for name in mine.__constants__:
        assert getattr(mine, name) == getattr(torchs, name)
    assert mine.__constants__ == torchs.__constants__
    assert repr(mine) == repr(torchs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_both_ways(mode: str, assign: bool) -> None:
    x = torch.randn(5, 2, 3)
    for table, input in ((LAYERS, x), (STEPS, x[0])):
        for source, target in (table[mode], table[mode][::-1]):
            a, b = source(3, 4), target(3, 4)
            b.load_state_dict(a.state_dict(), strict=True, assign=assign)
            assert_same(a(input), b(input))


# Dropout between layers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["dense", "batch_first", "unbatched", "unsorted"])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_uses_the_generator_as_torch_does(mode: str, layout: str, p: float) -> None:
    B = 1 if layout == "unbatched" else 3
    case = Case(mode, directions=2, layers=3, layout=layout, B=B)
    d = data(case, torch.float64)
    results, after = [], []
    for make in (ours, theirs):
        module = make(case, torch.float64)
        module.dropout = p
        torch.manual_seed(5)
        results.append(evaluate(module, case, d))
        after.append(torch.get_rng_state())
    assert torch.equal(*after)
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_eval_uses_no_dropout_and_no_generator(mode: str) -> None:
    mine, torchs = layers(mode, 3, 4, num_layers=2, dropout=0.5)
    mine.eval(), torchs.eval()
    x = torch.randn(5, 2, 3)
    before = torch.get_rng_state()
    assert_same(mine(x), torchs(x))
    assert torch.equal(before, torch.get_rng_state())


# Shapes in and out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3), (5, 1, 3), (1, 5, 3)], ids=str)
def test_shapes_and_strides(mode: str, batch_first: bool, shape: tuple[int, ...]) -> None:
    mine, torchs = layers(mode, 3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(shape)
    batch = () if len(shape) == 2 else (shape[0 if batch_first else 1],)
    for hx in (None, states(mode, 4, *batch, 4)):
        assert_same(mine(x, hx), torchs(x, hx))


@fast
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 0, 3), (1, 0, 3)], ids=str)
def test_an_empty_batch(mode: str, shape: tuple[int, ...], backend: str) -> None:
    for kwargs in ({}, {"num_layers": 2, "bidirectional": True}):
        mine, torchs = layers(mode, 3, 4, **kwargs)
        results = []
        for m in (mine, torchs):
            x = torch.randn(shape, requires_grad=True)
            with fastrnn.use_backend(backend):
                results.append(m(x))
            sum(t.sum() for t in flat(results[-1])).backward()
            assert x.grad is not None
            assert x.grad.shape == shape
        assert_same(*results)
        for a, b in zip(mine.parameters(), torchs.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_no_steps(mode: str, batch_first: bool) -> None:
    x = torch.randn((2, 0, 3) if batch_first else (0, 2, 3))
    for m in layers(mode, 3, 4, batch_first=batch_first):
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
            m(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sort", [True, False])
def test_packed_out_as_packed_in(mode: str, sort: bool) -> None:
    mine, torchs = layers(mode, 3, 4, bidirectional=True)
    lengths = (5, 4, 2, 1) if sort else (2, 5, 1, 4)
    x = pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=sort)
    (y, final), (expected, expected_final) = mine(x), torchs(x)
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.batch_sizes, expected.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        a, b = getattr(y, name), getattr(expected, name)
        assert a is None if b is None else torch.equal(a, b)
    assert_same((y, final), (expected, expected_final))


def test_lstm_takes_a_list_for_hx() -> None:
    mine, torchs = layers("LSTM", 3, 4)
    x, hx = torch.randn(5, 2, 3), list(states("LSTM", 1, 2, 4))
    assert_same(mine(x, hx), torchs(x, hx))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_other_dtypes(mode: str, dtype: torch.dtype) -> None:
    """Low precision runs, forward and backward, with about the results of torch.nn."""
    x = torch.randn(5, 2, 3, dtype=dtype)
    for modules, input in ((layers(mode, 3, 4), x), (steps(mode, 3, 4), x[0])):
        grads = []
        for m in modules:
            y = flat(m.to(dtype)(input))
            assert all(t.dtype == dtype for t in y)
            y[0].sum().backward()
            grads.append([p.grad for p in m.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


# Lengths


def by_single_sequences(
    m: nn.Module, x: Tensor, hx: list[Tensor], lengths: Any, batch_first: bool
) -> list[Tensor]:
    """The output and the final states of a layer that runs each sequence alone, without a batch."""
    rows = x if batch_first else x.transpose(0, 1)
    outputs, finals = [], []
    for b, n in enumerate(map(int, lengths)):
        state = [s[:, b] for s in hx]
        y = rows.new_zeros(6, 8)
        if n:
            y_n, *state = flat(m(rows[b, :n], state[0] if len(state) == 1 else tuple(state)))
            y = torch.cat([y_n, y[n:]])
        outputs.append(y)
        finals.append(state)
    output = torch.stack(outputs, 0 if batch_first else 1)
    return [output, *(torch.stack(s, 1) for s in zip(*finals, strict=True))]


def gradients_of(results: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a sum over all results; zero where no gradient is needed."""
    output, *final = results
    loss = output.sin().sum() + sum((s * s).sum() for s in final)
    if not loss.requires_grad:
        return tuple(torch.zeros_like(t) for t in leaves)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize(
    "given",
    [[3, 6, 1, 6], torch.tensor([0, 4, 2, 0]), torch.zeros(4, dtype=torch.uint16), (5, 5, 5, 5)],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_lengths(mode: str, given: Any, with_hx: bool, batch_first: bool) -> None:
    """Outputs and gradients are those of each sequence alone."""
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    mine, torchs = (c(3, 4, dtype=torch.float64, **options) for c in LAYERS[mode])
    torchs.load_state_dict(mine.state_dict())
    x = torch.randn(*((4, 6) if batch_first else (6, 4)), 3, dtype=torch.float64)
    hx = flat(states(mode, 4, 4, 4, dtype=torch.float64))
    leaves = [t.requires_grad_() for t in (x, *hx)]
    first = hx if with_hx else [torch.zeros_like(s) for s in hx]
    state = (hx[0] if len(hx) == 1 else tuple(hx)) if with_hx else None

    found = flat(mine(x, state, lengths=given))
    assert found[0].requires_grad
    expected = by_single_sequences(torchs, x, first, given, batch_first)
    found += gradients_of(found, [*leaves, *mine.parameters()])
    expected += gradients_of(expected, [*leaves, *torchs.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_lengths_of_no_steps_or_sequences() -> None:
    m = fastrnn.LSTM(3, 5, proj_size=2)
    hx = (torch.randn(1, 2, 2), torch.randn(1, 2, 5))
    output, final = m(torch.randn(0, 2, 3), hx, lengths=[0, 0])
    assert output.shape == (0, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(final, hx, strict=True))
    assert final[0].data_ptr() != hx[0].data_ptr()
    with torch.autocast("cpu", torch.bfloat16):
        for lengths in ([0, 0], [0, 1]):
            output, (h, c) = m(torch.randn(1, 2, 3), lengths=lengths)
            assert output.dtype is h.dtype is c.dtype is torch.bfloat16
    output, (h, c) = m(torch.randn(4, 0, 3), lengths=[])
    assert output.shape == (4, 0, 2) and h.shape == (1, 0, 2) and c.shape == (1, 0, 5)


@pytest.mark.parametrize(
    "lengths,error,message",
    [
        ([1, 2, 3], ValueError, r"shape \[2\], got \[3\]"),
        ([[1, 2]], ValueError, r"shape \[2\]"),
        (3, ValueError, r"shape \[2\]"),
        ([1, 6], ValueError, "from 0 to 5"),
        ([-1, 2], ValueError, "from 0 to 5"),
        ([1.0, 2.0], TypeError, "integers"),
        ([True, False], TypeError, "integers"),
        ("ab", TypeError, "integers"),
        ([2**70, 1], TypeError, "integers"),
        (torch.ones(2, dtype=torch.complex128), TypeError, "integers"),
        (torch.ones(2, dtype=torch.int64, device="meta"), TypeError, "got a meta tensor"),
        (
            torch.ones(2, dtype=torch.int64).to_sparse(),
            TypeError,
            "got a tensor of layout torch.sparse",
        ),
    ],
)
def test_wrong_lengths(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastrnn.GRU(3, 4)(torch.randn(5, 2, 3), lengths=lengths)


def test_lengths_under_another_default_device() -> None:
    m, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    expected = m(x, lengths=[5, 3])[0]
    with torch.device("meta"):
        assert torch.equal(m(x, lengths=[5, 3])[0], expected)


def test_lengths_of_zero_do_not_skip_a_check() -> None:
    with pytest.raises(RuntimeError, match="input's device meta, got weights on cpu"):
        fastrnn.GRU(3, 4)(torch.randn(5, 2, 3, device="meta"), lengths=[0, 0])


def test_lengths_need_a_padded_batch() -> None:
    m = fastrnn.GRU(3, 4)
    for input in (torch.randn(5, 3), pack_sequence([torch.randn(5, 3)])):
        with pytest.raises(ValueError, match="3D tensor with lengths"):
            m(input, lengths=[5])
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        m(torch.randn(5, 2, 3), torch.zeros(1, 3, 4), lengths=[0, 0])
    with pytest.raises(RuntimeError, match="input_size"):
        m(torch.randn(5, 2, 7), lengths=[0, 0])


# Errors

x3 = partial(torch.randn, 5, 2)
BAD_FORWARD: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "1-D input": lambda mode: (torch.randn(3),),
    "4-D input": lambda mode: (torch.randn(1, 5, 2, 3),),
    "0-D input": lambda mode: (torch.tensor(1.0),),
    "features": lambda mode: (x3(7),),
    "no features": lambda mode: (x3(0),),
    "unbatched features": lambda mode: (torch.randn(5, 7),),
    "float64": lambda mode: (x3(3).double(),),
    "int": lambda mode: (x3(3).long(),),
    "no steps": lambda mode: (torch.randn(0, 2, 3),),
    "no steps, unbatched": lambda mode: (torch.randn(0, 3),),
    "hx batch": lambda mode: (x3(3), states(mode, 1, 3, 4)),
    "hx size": lambda mode: (x3(3), states(mode, 1, 2, 5)),
    "hx layers": lambda mode: (x3(3), states(mode, 2, 2, 4)),
    "hx unbatched": lambda mode: (x3(3), states(mode, 1, 4)),
    "hx 4-D": lambda mode: (x3(3), states(mode, 1, 1, 2, 4)),
    "hx 0-D": lambda mode: (x3(3), states(mode)),
    "hx batched, input not": lambda mode: (torch.randn(5, 3), states(mode, 1, 1, 4)),
    "hx size, unbatched": lambda mode: (torch.randn(5, 3), states(mode, 1, 5)),
    "packed features": lambda mode: (pack_sequence([torch.randn(4, 7)]),),
    "packed float64": lambda mode: (pack_sequence([torch.randn(4, 3).double()]),),
    "packed 3-D": lambda mode: (pack_sequence([torch.randn(4, 3, 2)]),),
    "packed hx batch": lambda mode: (pack_sequence([torch.randn(4, 3)]), states(mode, 1, 2, 4)),
    "packed hx size": lambda mode: (pack_sequence([torch.randn(4, 3)]), states(mode, 1, 1, 5)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BAD_FORWARD)
def test_forward_refuses(mode: str, name: str) -> None:
    mine = layers(mode, 3, 4)[0]
    args = BAD_FORWARD[name](mode)
    # torch's LSTM skips its checks on packed input and reads past the end of it; its GRU does not.
    checked = "GRU" if name.startswith("packed") else mode
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        layers(checked, 3, 4)[1](*BAD_FORWARD[name](checked))
    with pytest.raises(theirs.type) as info:
        mine(*args)
    assert re.search(r"(?i)expected|match|should|must", str(info.value))
    assert re.search(r"(?i)got|does not match", str(info.value))


@pytest.mark.parametrize(
    ("name", "expected", "got"),
    [
        ("features", "Expected 3", "got 7"),
        ("1-D input", "2D or 3D", "got 1D"),
        ("float64", "weight dtype (torch.float32)", "input dtype (torch.float64)"),
        ("hx batch", "(1, 2, 4)", "got [1, 3, 4]"),
        ("hx unbatched", "For batched 3-D input", "2-D"),
        ("hx batched, input not", "For unbatched 2-D input", "3-D"),
        ("packed hx batch", "(1, 1, 4)", "got [1, 2, 4]"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_message_names_expected_and_got(mode: str, name: str, expected: str, got: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as info:
        layers(mode, 3, 4)[0](*BAD_FORWARD[name](mode))
    assert expected in str(info.value)
    assert got in str(info.value)


def test_each_state_of_an_lstm_is_checked() -> None:
    h, c = states("LSTM", 1, 2, 4)
    m = fastrnn.LSTM(3, 4)
    with pytest.raises(RuntimeError, match=r"hidden\[1\] size \(1, 2, 4\), got \[1, 3, 4\]"):
        m(x3(3), (h, torch.randn(1, 3, 4)))
    with pytest.raises(RuntimeError, match=r"hidden\[0\] size \(1, 2, 4\), got \[1, 3, 4\]"):
        m(x3(3), (torch.randn(1, 3, 4), c))
    projected = fastrnn.LSTM(3, 4, proj_size=2)
    with pytest.raises(RuntimeError, match=r"hidden\[0\] size \(1, 2, 2\), got \[1, 2, 4\]"):
        projected(x3(3), (h, c))


BAD_STEP: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "0-D": lambda mode: (torch.tensor(1.0),),
    "3-D": lambda mode: (x3(3),),
    "features": lambda mode: (torch.randn(2, 7),),
    "unbatched features": lambda mode: (torch.randn(7),),
    "hx batch": lambda mode: (torch.randn(2, 3), states(mode, 3, 4)),
    "hx size": lambda mode: (torch.randn(2, 3), states(mode, 2, 5)),
    "hx 3-D": lambda mode: (torch.randn(2, 3), states(mode, 1, 2, 4)),
    "hx unbatched": lambda mode: (torch.randn(2, 3), states(mode, 4)),
    "hx batched, input not": lambda mode: (torch.randn(3), states(mode, 2, 4)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BAD_STEP)
def test_cell_refuses(mode: str, name: str) -> None:
    mine, torchs = steps(mode, 3, 4)
    args = BAD_STEP[name](mode)
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        torchs(*args)
    with pytest.raises(theirs.type, match=r"(?i)got|match"):
        mine(*args)


@fast
@pytest.mark.parametrize("mode", MODES)
def test_cell_takes_what_torch_takes(mode: str, backend: str) -> None:
    mine, torchs = steps(mode, 3, 4)
    for shape in ((3,), (1, 3), (2, 3), (0, 3)):
        x = torch.randn(shape)
        for hx in (None, states(mode, *shape[:-1], 4)):
            with fastrnn.use_backend(backend):
                assert_same(mine(x, hx), torchs(x, hx))


def test_unknown_nonlinearity_of_a_cell() -> None:
    for module in (fastrnn, nn):
        cell = module.RNNCell(3, 4, nonlinearity="sigmoid")
        with pytest.raises(RuntimeError, match="nonlinearity"):
            cell(torch.randn(2, 3))


# torch's methods that user code calls and overrides


@pytest.mark.parametrize("mode", MODES)
def test_check_methods(mode: str) -> None:
    mine, torchs = layers(mode, 3, 4, num_layers=2)
    x, sizes = torch.randn(5, 2, 3), torch.tensor([2, 1])
    hx = states(mode, 2, 2, 4)
    order = torch.tensor([1, 0])
    for m in (mine, torchs):
        assert m.get_expected_hidden_size(x, None) == (2, 2, 4)
        assert m.get_expected_hidden_size(x[0], sizes) == (2, 2, 4)
        m.check_input(x, None)
        m.check_input(x[0], sizes)
        m.check_forward_args(x, hx, None)
        m.flatten_parameters()
        with pytest.raises(RuntimeError, match="Expected hidden size"):
            m.check_hidden_size(torch.randn(2, 3, 4), (2, 2, 4))
        with pytest.raises(RuntimeError, match="Expected hidden"):
            m.check_forward_args(x, states(mode, 2, 3, 4), None)
        with pytest.raises(RuntimeError, match="must have 3 dimensions"):
            m.check_input(x[0], None)
    assert_same(mine.permute_hidden(hx, order), torchs.permute_hidden(hx, order))
    assert mine.permute_hidden(hx, None) is not None
    if mode == "LSTM":
        for m in (mine, torchs):
            assert m.get_expected_cell_size(x, None) == (2, 2, 4)


# Copies, storage, devices


def saved(m: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emptied(m: nn.Module) -> nn.Module:
    state = {k: v.clone() for k, v in m.state_dict().items()}
    m = m.to("meta").to_empty(device="cpu")
    m.load_state_dict(state)
    return m


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "meta and back": emptied,
    "share_memory": lambda m: m.share_memory(),
    "double and back": lambda m: m.double().float(),
    "eval": lambda m: m.eval(),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mode", MODES)
def test_copies_compute_the_same(mode: str, how: str) -> None:
    x = torch.randn(5, 2, 3)
    layer, cell = layers(mode, 3, 4, num_layers=2, bidirectional=True)[0], steps(mode, 3, 4)[0]
    for m, input in ((layer, x), (cell, x[0])):
        expected = m(input)
        other = COPIES[how](m)
        assert_same(other(input), expected)
        assert repr(other) == repr(m)
        assert list(other.state_dict()) == list(m.state_dict())
        sum(t.sum() for t in flat(other(input))).backward()


def test_whole_modules_in_a_new_process(tmp_path: Path) -> None:
    """Loaded whole, and under weights_only once their classes are declared safe."""
    model = nn.ModuleDict({"layer": fastrnn.LSTM(3, 4, 2, bidirectional=True)})
    for name in ("RNNCell", "LSTMCell", "GRUCell"):
        model[name] = getattr(fastrnn, name)(3, 4)
    x = torch.randn(5, 2, 3)
    expected = {n: flat(m(x if n == "layer" else x[0])) for n, m in model.items()}
    torch.save(model, tmp_path / "model.pt")
    torch.save({n: [t.detach() for t in ts] for n, ts in expected.items()}, tmp_path / "results.pt")
    torch.save(x, tmp_path / "x.pt")
    code = """
        import sys, torch
        x, expected = torch.load("x.pt"), torch.load("results.pt")
        for weights_only in (False, True):
            if weights_only:
                import fastrnn
                ours = [fastrnn.LSTM, fastrnn.RNNCell, fastrnn.LSTMCell, fastrnn.GRUCell]
                torch.serialization.add_safe_globals([torch.nn.ModuleDict, *ours])
            model = torch.load("model.pt", weights_only=weights_only)
            for name, m in model.items():
                leaves = torch.utils._pytree.tree_leaves(m(x if name == "layer" else x[0]))
                torch.testing.assert_close(leaves, expected[name])
        print("done")
    """
    assert run_script(code, tmp_path) == "done"


@pytest.mark.parametrize("mode", MODES)
def test_a_deepcopy_has_weights_of_its_own(mode: str) -> None:
    m = layers(mode, 3, 4)[0]
    x = torch.randn(5, 2, 3)
    expected = m(x)
    other = copy.deepcopy(m)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_same(m(x), expected)
    assert flat(other(x))[0].abs().max() == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("automatic")
def test_meta_device(mode: str) -> None:
    for table, shape in ((LAYERS, (5, 2, 3)), (STEPS, (2, 3))):
        m = table[mode][0](3, 4, device="meta")
        expected = table[mode][1](3, 4)(torch.randn(shape))
        got = m(torch.randn(shape, device="meta"))
        for a, b in zip(flat(got), flat(expected), strict=True):
            assert a.is_meta
            assert a.shape == b.shape
        with torch.device("meta"):
            assert next(table[mode][0](3, 4).parameters()).is_meta


def test_a_list_of_weights_that_is_set() -> None:
    """torch.nn computes with it. Our layers read the attributes, and raise where the two differ."""
    m = fastrnn.LSTM(3, 4)
    m._flat_weights = list(m.parameters())
    nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")
    m._flat_weights = m._flat_weights
    with pytest.raises(
        RuntimeError, match=r"LSTM's own weights in _flat_weights, .*: set weight_hh"
    ):
        m._flat_weights = [w.detach().clone() for w in m.parameters()]
    with pytest.raises(RuntimeError, match="own weights"):
        m._flat_weights = m._flat_weights[:2]


def test_isinstance_of_torchs_bases() -> None:
    assert isinstance(fastrnn.LSTM(3, 4), nn.RNNBase)
    assert isinstance(fastrnn.LSTMCell(3, 4), nn.LSTMCell)


def test_a_new_mode_needs_no_class_of_its_own() -> None:
    mine, torchs = fastrnn.RNNBase("GRU", 3, 4), nn.GRU(3, 4)
    mine.load_state_dict(torchs.state_dict())
    x = torch.randn(5, 2, 3)
    assert_same(mine(x), torchs(x))


# Weights are read when the layer is called


def in_place(m: nn.Module) -> None:
    with torch.no_grad():
        m.weight_hh_l0.mul_(2)


def through_data(m: nn.Module) -> None:
    m.weight_hh_l0.data = m.weight_hh_l0.data * 2


def data_in_place(m: nn.Module) -> None:
    m.weight_ih_l0.data.mul_(2)


def numpy_view(m: nn.Module) -> None:
    m.weight_hh_l0.detach().numpy()[...] *= 2  # leaves Tensor._version alone


def fused_step(m: nn.Module) -> None:
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(m.parameters(), lr=0.1, fused=True).step()  # as does this


def replaced(m: nn.Module) -> None:
    m.weight_hh_l0 = nn.Parameter(m.weight_hh_l0.detach() * 2)


def dropped(m: nn.Module) -> None:
    raw = m.weight_hh_l0
    del m.weight_hh_l0
    m.register_parameter("raw", nn.Parameter(raw.detach()))
    torch.manual_seed(3)
    m.weight_hh_l0 = F.dropout(m.raw, 0.5)


def tied(m: nn.Module) -> None:
    m.weight_hh_l0_reverse = m.weight_hh_l0


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2


def parametrized(m: nn.Module) -> None:
    parametrize.register_parametrization(m, "weight_hh_l0", Twice())


def old_weight_norm(m: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(m, "weight_hh_l0")


def pruned(m: nn.Module) -> None:
    torch.manual_seed(3)
    prune.random_unstructured(m, "weight_hh_l0", 0.5)


def spectral(m: nn.Module) -> None:
    torch.manual_seed(3)
    parametrizations.spectral_norm(m, "weight_hh_l0")
    m.parametrizations.eval()  # torch.nn evaluates it more than once a call: a step each


def orthogonal(m: nn.Module) -> None:
    torch.manual_seed(3)
    parametrizations.orthogonal(m, "weight_hh_l0")


def new_weight_norm(m: nn.Module) -> None:
    parametrizations.weight_norm(m, "weight_ih_l0")


EDITS: list[Callable[[nn.Module], None]] = [
    in_place,
    through_data,
    data_in_place,
    numpy_view,
    fused_step,
    replaced,
    dropped,
    tied,
    parametrized,
    old_weight_norm,
    pruned,
    spectral,
    orthogonal,
    new_weight_norm,
]


@pytest.mark.isa
@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", MODES)
def test_weights_are_read_at_every_call(mode: str, edit: Callable[[nn.Module], None]) -> None:
    x = torch.randn(5, 20, 3)  # enough rows for the engine to pack its weights
    mine, torchs = layers(mode, 3, 4, bidirectional=True)
    before = [flat(m(x))[0] for m in (mine, torchs)]
    assert_same(*before)
    with torch.no_grad():
        mine(x)
    grads = []
    for m in (mine, torchs):
        edit(m)
        with torch.no_grad():
            m(x)
        m.zero_grad()
        y = m(x)
        grads.append(torch.autograd.grad(flat(y)[0].square().sum(), list(m.parameters())))
        before.append(flat(y)[0])
    assert_same(before[2], before[3])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_parametrization_is_evaluated_once_a_call() -> None:
    m = fastrnn.LSTM(3, 4)
    parametrized(m)
    calls = []
    m.parametrizations.weight_hh_l0[0].register_forward_hook(lambda *_: calls.append(1))
    m(torch.randn(5, 2, 3))
    assert len(calls) == 1
    m(torch.randn(5, 2, 3), lengths=[5, 0])
    assert len(calls) == 2


@pytest.mark.parametrize("mode", MODES)
def test_functional_call(mode: str) -> None:
    x = torch.randn(5, 2, 3)
    for modules, input in ((layers(mode, 3, 4), x), (steps(mode, 3, 4), x[0])):
        weights = {k: torch.randn_like(v) for k, v in modules[0].state_dict().items()}
        untouched = [m(input) for m in modules]
        assert_same(*(functional_call(m, weights, (input,)) for m in modules))
        assert_same(modules[0](input), untouched[0])


def test_weights_on_a_flattened_storage() -> None:
    """Views into one vector, as torch.nn.utils.vector_to_parameters makes them."""
    mine, torchs = layers("LSTM", 3, 4)
    vector = torch.randn(sum(p.numel() for p in mine.parameters()) + 1)
    for m in (mine, torchs):
        offset = 1  # so that no weight starts at an aligned address
        for p in m.parameters():
            p.data = vector[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
    x = torch.randn(5, 2, 3)
    assert_same(mine(x), torchs(x))


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_are_not_contiguous(mode: str) -> None:
    mine, torchs = layers(mode, 4, 4)
    for m in (mine, torchs):
        for p in m.parameters():
            p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data.expand_as(p)
    x = torch.randn(5, 20, 4)
    results = []
    for m in (mine, torchs):
        y = m(x)
        results.append([*flat(y), *torch.autograd.grad(flat(y)[0].sum(), list(m.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_inference_mode(mode: str) -> None:
    mine, torchs = layers(mode, 3, 4)
    x = torch.randn(5, 2, 3)
    with torch.inference_mode():
        assert_same(mine(x), torchs(x))
        assert flat(mine(x))[0].is_inference()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("mode", MODES)
def test_built_in_inference_mode_and_called_outside(mode: str, backend: str, frozen: bool) -> None:
    for table, shape in ((LAYERS, (5, 2, 3)), (STEPS, (2, 3))):
        with torch.inference_mode():
            torch.manual_seed(0)
            built = table[mode][0](3, 4)
        torch.manual_seed(0)
        usual, x = table[mode][0](3, 4), torch.randn(shape, requires_grad=True)
        results = []
        for m in (built, usual):
            if frozen:
                m.requires_grad_(False)
            leaves = [x, *(() if frozen else m.parameters())]
            with fastrnn.use_backend(backend):
                outputs = flat(m(x))
            results.append([*outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), leaves)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_arguments_by_name() -> None:
    """Every keyword of a case is one that torch.nn takes."""
    case = Case(
        "LSTM",
        directions=2,
        layers=2,
        bias=False,
        layout="batch_first",
        projected=True,
        T=1,
        B=1,
        I=1,
        H=2,
    )
    assert set(arguments(case)) <= set(nn.RNNBase.__init__.__code__.co_varnames)
    d = data(case, torch.float32)
    outputs = [call(m(case, torch.float32), case, d.x, None, d.hx) for m in (ours, theirs)]
    assert_same(*outputs)

"""Models of torch.nn modules, converted to fastrnn and back."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn

pytestmark = pytest.mark.contract

OURS = {
    nn.RNN: fastrnn.RNN,
    nn.LSTM: fastrnn.LSTM,
    nn.GRU: fastrnn.GRU,
    nn.RNNCell: fastrnn.RNNCell,
    nn.LSTMCell: fastrnn.LSTMCell,
    nn.GRUCell: fastrnn.GRUCell,
}


class Model(nn.Module):
    """Every class, nested, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.2)
        self.inner = nn.ModuleDict({"gru": nn.GRU(8, 4), "list": nn.ModuleList([nn.RNN(4, 4)])})
        self.again = self.inner["list"][0]
        self.cells = nn.ModuleList(
            [nn.RNNCell(4, 4, nonlinearity="relu"), nn.LSTMCell(4, 4), nn.GRUCell(4, 4)]
        )
        self.projected = nn.LSTM(4, 6, proj_size=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.inner["gru"](self.first(x)[0])[0])[0]
        y = self.again(y)[0]
        h = [cell(y[-1]) for cell in self.cells]
        return self.projected(y)[0].sum() + h[0].sum() + h[1][0].sum() + h[2].sum()


def classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {n: type(m) for n, m in model.named_modules() if type(m) in {*OURS, *OURS.values()}}


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = model(x)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_convert_revert_roundtrip(training: bool) -> None:
    model, x = Model().train(training), torch.randn(5, 2, 3)
    model.first.dropout = 0.0
    before, modules, parameters = classes(model), dict(model.named_modules()), [*model.parameters()]
    expected = results(model, x)
    assert fastrnn.convert(model) is model
    assert classes(model) == {n: OURS[c] for n, c in before.items()}
    assert_same(results(model, x), expected)
    for _ in range(2):
        assert dict(model.named_modules()) == modules
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
        assert all(m.training is training for m in model.modules())
        assert fastrnn.revert(model) is model
    assert classes(model) == before
    assert_same(results(model, x), expected)
    assert_same(results(pickle.loads(pickle.dumps(model)), x), expected)
    model.double()(x.double())  # replaces the list of weights in torch.nn's layers


def test_convert_a_root_and_fastrnn_modules() -> None:
    lstm = nn.LSTM(3, 4)
    assert type(fastrnn.convert(lstm)) is fastrnn.LSTM and type(lstm) is fastrnn.LSTM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.convert(lstm)
        fastrnn.convert(nn.Sequential(fastrnn.GRUCell(3, 4), nn.Linear(3, 4)))
    assert type(fastrnn.revert(lstm)) is nn.LSTM


def test_optimizers_go_on() -> None:
    model, x = Model().eval(), torch.randn(5, 2, 3)
    torchs = copy.deepcopy(model)
    steps = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, torchs)]
    for k in range(3):
        if k == 1:
            fastrnn.convert(model)
        for m, step in zip((model, torchs), steps, strict=True):
            step.zero_grad()
            m(x).backward()
            step.step()
    assert_same([*model.parameters()], [*torchs.parameters()])


def test_hooks_stay() -> None:
    lstm, seen = nn.LSTM(3, 4), []
    lstm.register_forward_pre_hook(lambda *_: seen.append("before"))
    lstm.register_forward_hook(lambda *_: seen.append("after"))
    lstm.register_full_backward_hook(lambda *_: seen.append("backward"))
    lstm.weight_hh_l0.register_hook(lambda _: seen.append("weight"))
    fastrnn.convert(lstm)(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
    assert sorted(seen) == ["after", "backward", "before", "weight"]


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


PARAMETRISED: dict[str, Any] = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Twice()),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_ih_l0"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "prune": lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", PARAMETRISED)
def test_parametrisations_stay(how: str) -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(4, 4), torch.randn(5, 2, 4)
    PARAMETRISED[how](lstm)
    expected = lstm(x)[0]
    for change, kind in ((fastrnn.convert, fastrnn.LSTM), (fastrnn.revert, nn.LSTM)):
        change(lstm)
        assert isinstance(lstm, kind)
        torch.testing.assert_close(lstm(x)[0], expected)
    if parametrize.is_parametrized(lstm):
        fastrnn.convert(lstm)
        parametrize.remove_parametrizations(lstm, next(iter(lstm.parametrizations)))
        assert type(lstm) is fastrnn.LSTM
        torch.testing.assert_close(lstm(x)[0], expected)


class Own(nn.LSTM):
    pass


class OwnOfOurs(fastrnn.GRU):
    pass


def test_convert_names_the_modules_that_it_leaves() -> None:
    model = nn.ModuleDict({"a": Own(3, 4), "b": nn.GRU(3, 4), "c": OwnOfOurs(3, 4)})
    with pytest.warns(UserWarning, match=r"did not convert all: a \(Own\) is a subclass"):
        fastrnn.convert(model)
    assert [type(m) for m in model.values()] == [Own, fastrnn.GRU, OwnOfOurs]
    with pytest.warns(UserWarning, match=r"did not revert all: c \(OwnOfOurs\)"):
        fastrnn.revert(model)
    assert [type(m) for m in model.values()] == [Own, nn.GRU, OwnOfOurs]


def test_convert_leaves_complex_modules() -> None:
    model = nn.Sequential(nn.LSTM(3, 4, dtype=torch.complex64))
    with pytest.warns(UserWarning, match=r"did not convert all: 0 \(LSTM\) is complex"):
        fastrnn.convert(model)
    model(torch.randn(5, 2, 3, dtype=torch.complex64))


def test_convert_leaves_bases_and_own_methods() -> None:
    hooked = nn.GRU(3, 4)
    hooked.forward = hooked.forward
    model = nn.ModuleDict({"a": nn.RNNBase("LSTM", 3, 4), "b": hooked})
    with pytest.warns(
        UserWarning, match=r"a \(RNNBase\) is a sub.*; b \(GRU\) has a forward method"
    ):
        fastrnn.convert(model)
    assert [type(m) for m in model.values()] == [nn.RNNBase, nn.GRU]
    with pytest.raises(TypeError, match="Module, got list"):
        fastrnn.convert([nn.GRU(3, 4)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_convert_leaves_scripted_modules() -> None:
    model = nn.Sequential(torch.jit.script(nn.LSTM(3, 4)))
    with pytest.warns(UserWarning, match=r"0 \(RecursiveScriptModule\) was compiled"):
        fastrnn.convert(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [fastrnn.LSTM, fastrnn.GRUCell])
def test_script_is_refused_and_revert_helps(make: Any) -> None:
    model = nn.Sequential(make(3, 4))
    with pytest.raises(RuntimeError, match=r"fastrnn\.revert"):
        torch.jit.script(model)
    x = torch.randn(5, 3)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(fastrnn.revert(model))(x), expected)


def test_a_pickle_of_torchs_layer_becomes_ours_inside_patched() -> None:
    """Without torch.nn's list of weights."""
    saved, x = pickle.dumps(torchs := nn.GRU(3, 4)), torch.randn(5, 2, 3)
    with fastrnn.patched():
        m = pickle.loads(saved)
    assert type(m) is fastrnn.GRU and "_flat_weights" not in vars(m)
    torch.testing.assert_close(m(x), torchs(x))


def test_patched() -> None:
    before = {c.__name__: getattr(nn, c.__name__) for c in OURS}
    with fastrnn.patched():
        assert set(classes(Model()).values()) == set(OURS.values())
        assert nn.modules.rnn.LSTM is fastrnn.LSTM
    assert {c.__name__: getattr(nn, c.__name__) for c in OURS} == before
    with pytest.raises(KeyError), fastrnn.patched():
        raise KeyError
    first, second = fastrnn.patched(), fastrnn.patched()
    for change in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        change()
        assert nn.LSTM is fastrnn.LSTM
    second.__exit__(None, None, None)
    assert set(classes(Model()).values()) == set(OURS)

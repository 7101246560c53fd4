"""Oracles from outside: torch's own inputs for its modules, torch.nn over all options at once, and
onnxruntime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import (
    LAYERS,
    Case,
    Results,
    assert_near,
    data,
    evaluate,
    ours,
    runnable,
    theirs,
    valid,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import fastrnn

pytestmark = pytest.mark.contract

F32, F64 = torch.float32, torch.float64
NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_inputs(name: str, dtype: torch.dtype, training: bool) -> None:
    """The inputs of torch's own module tests: outputs, and the gradients of every leaf."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_db

    (info,) = [each for each in module_db if each.module_cls is getattr(nn, name)]
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    assert inputs
    for each in inputs:
        built, given = each.constructor_input, each.forward_input
        results = []
        for library in (fastrnn, nn):
            torch.manual_seed(0)
            m = getattr(library, name)(*built.args, **built.kwargs).to(dtype).train(training)
            args = tree_map_only(
                Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), given.args
            )
            outputs = tree_leaves(m(*args, **given.kwargs))
            leaves = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
            leaves += list(m.parameters())
            torch.manual_seed(0)
            cotangents = [torch.randn_like(y) for y in outputs]
            grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
            results.append([*outputs, *grads])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


SIZES = {"T": st.integers(1, 24), "B": st.integers(1, 20), "I": st.integers(1, 70)}


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    values: dict[str, Any] = {
        "mode": draw(st.sampled_from(list(LAYERS))),
        "directions": draw(st.integers(1, 2)),
        "layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "layout": draw(
            st.sampled_from(["dense", "batch_first", "unbatched", "packed", "unsorted"])
        ),
        "projected": draw(st.booleans()),
        "hx": draw(st.booleans()),
        **{name: draw(size) for name, size in SIZES.items()},
        "H": draw(st.integers(1, 150)),
        **fixed,
    }
    if values["layout"] == "unbatched":
        values["B"] = 1
    assume(valid(values))
    return Case(**values)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(cases(), st.sampled_from([F32, F64]), st.sampled_from([0.0, 0.3, 1.0]), st.data())
@pytest.mark.parametrize("backend", runnable())
def test_any_options(
    backend: str, case: Case, dtype: torch.dtype, dropout: float, draw: st.DataObject
) -> None:
    """All options at once, with some weights frozen, against torch.nn in float64."""
    # The masks of two dtypes are not the same.
    dropout = dropout if dtype is F64 and case.layers > 1 else 0.0
    modules = ours(case, dtype), theirs(case, dtype).double()
    frozen = draw.draw(st.sets(st.sampled_from([n for n, _ in modules[0].named_parameters()])))
    d, results = data(case, dtype), []
    for m, where, dtyped in ((modules[0], backend, d), (modules[1], None, d.to(F64))):
        m.dropout = dropout
        torch.manual_seed(3)
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(name not in frozen)
        results.append(evaluate(m, case, dtyped, where))
    assert_near(*results, dtype)


# ONNX's order of torch's gates.
ONNX_GATES = {"RNN_TANH": (0,), "RNN_RELU": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


def by_onnxruntime(m: fastrnn.RNNBase, case: Case, x: Tensor, lengths: Tensor, hx: Any) -> Results:
    """One layer as one node, with the length of every sequence."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, order, H = onnx.helper, ONNX_GATES[case.mode], case.H

    def rows(name: str) -> Tensor:
        directions = ("", "_reverse")[: case.directions]
        weights = [getattr(m, f"{name}_l0{d}").detach() for d in directions]
        return torch.stack([w.view(len(order), H, -1)[list(order)].flatten(0, 1) for w in weights])

    feed = {"X": x, "W": rows("weight_ih"), "R": rows("weight_hh"), "lengths": lengths.int()}
    if case.bias:
        feed["B"] = torch.cat([rows("bias_ih"), rows("bias_hh")], 1).squeeze(2)
    names = [f"{s}_0" for s in case.cell.states] if hx else []
    feed |= dict(zip(names, hx or (), strict=True))
    outputs = ["Y", *(f"{s}_n" for s in case.cell.states)]
    attributes: dict[str, Any] = {"hidden_size": H}
    attributes["direction"] = "bidirectional" if case.directions == 2 else "forward"
    if case.mode == "GRU":
        attributes["linear_before_reset"] = 1
    if case.mode == "RNN_RELU":
        attributes["activations"] = ["Relu"] * case.directions
    inputs = ["X", "W", "R", "B" if case.bias else "", "lengths", *names]
    node = helper.make_node(case.mode.split("_")[0], inputs, outputs, **attributes)
    types = onnx.TensorProto
    values = [
        helper.make_tensor_value_info(
            name, types.INT32 if t.dtype is torch.int32 else types.FLOAT, list(t.shape)
        )
        for name, t in feed.items()
    ]
    results = [helper.make_tensor_value_info(name, types.FLOAT, None) for name in outputs]
    model = helper.make_model(
        helper.make_graph([node], "layer", values, results),
        opset_imports=[helper.make_opsetid("", 14)],
        ir_version=8,
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(outputs, {name: t.numpy() for name, t in feed.items()})
    y, *final = map(torch.from_numpy, found)
    return {"output": y.transpose(1, 2).flatten(2), **dict(zip(outputs[1:], final, strict=True))}


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(cases(layers=1, projected=False, layout="dense"), st.data())
def test_onnxruntime_agrees(case: Case, draw: st.DataObject) -> None:
    m, d = ours(case, F32), data(case, F32)
    lengths = torch.tensor(
        draw.draw(st.lists(st.integers(1, case.T), min_size=case.B, max_size=case.B))
    )
    hx = d.hx if d.hx is None or len(d.hx) > 1 else d.hx[0]
    with torch.no_grad():
        output, final = m(d.x, hx, lengths=lengths)
    states = dict(zip((f"{s}_n" for s in case.cell.states), tree_leaves(final), strict=True))
    expected = by_onnxruntime(m, case, d.x, lengths, d.hx)
    assert_near({"output": output, **states}, expected, F32)

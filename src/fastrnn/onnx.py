"""A layer as the operator of ONNX's that does the same, for ``torch.onnx.export(dynamo=True)``.

torch's own decomposition fixes the sizes of the example and unrolls an RNN over time; the operator
has any length and batch. Source: the ONNX operators RNN, GRU and LSTM, version 22.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.cells import Cell, State, Weights

__all__ = ["check", "exporting", "knows", "layer"]

# ONNX's order of the gates by cells.py's names, and what else sets a node apart.
_GATES = {"RNN_TANH": "h", "RNN_RELU": "h", "GRU": "zrn", "LSTM": "iofg"}


def exporting() -> bool:
    """Whether an exporter of either kind records."""
    return torch.onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result: the compiler itself would say that nobody exports.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def knows(cell: Cell) -> bool:
    """Whether ONNX has the cell, and this torch a way to ask for it (2.8 or later)."""
    return cell.mode in _GATES and hasattr(torch.onnx, "ops")


def check(weights: Weights) -> None:
    """Refuse what ONNX does not know, for either exporter.

    Raises:
        RuntimeError: the layer is projected.
    """
    if weights[4] is not None:
        raise RuntimeError("ONNX has no operator for an LSTM with projections (proj_size)")


def layer(
    cell: Cell, x: Tensor, weights: Sequence[Weights], state: State | None
) -> tuple[Tensor, State]:
    """As :func:`fastrnn.autograd.layer`."""
    T, B, _ = x.shape
    D, H = len(weights), weights[0][1].shape[1]
    w_ih, w_hh, b_ih, b_hh, _ = zip(*weights, strict=True)
    bias = None
    if b_ih[0] is not None:
        bias = torch.cat([_stacked(cell, b_ih), _stacked(cell, b_hh)], 1)
    inputs = [x, _stacked(cell, w_ih), _stacked(cell, w_hh), bias, None, *(state or ())]
    attributes: dict[str, Any] = {
        "hidden_size": H,
        "direction": "bidirectional" if D == 2 else "forward",
    }
    if cell.mode == "GRU":
        attributes["linear_before_reset"] = 1  # r multiplies after the product
    if cell.mode == "RNN_RELU":
        attributes["activations"] = ["Relu"] * D
    shapes = [(T, D, B, H), *((D, B, H) for _ in cell.states)]
    y, *finals = torch.onnx.ops.symbolic_multi_out(
        cell.mode.split("_")[0], inputs, attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes
    )
    return y.transpose(1, 2).flatten(2), tuple(finals)


def _stacked(cell: Cell, weights: Sequence[Tensor]) -> Tensor:
    """One weight of all directions, its gates in ONNX's order."""
    order = [cell.gates.index(gate) for gate in _GATES[cell.mode]]
    gates = (w.chunk(len(order)) for w in weights)
    return torch.stack([torch.cat([each[k] for k in order]) for each in gates])

"""A layer as the ONNX operator that computes the same, for ``torch.onnx.export(dynamo=True)``.

torch's own decomposition fixes the sizes of the example and unrolls an RNN over time. The operator
takes any length and batch. Source: the ONNX operators RNN, GRU and LSTM, version 22.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.cells import Cell, State
from fastrnn.layer import Layer, Weights

__all__ = ["check", "emit_node", "knows"]

# ONNX's order of the gates, by the names of cells.py.
_GATES = {"RNN_TANH": "h", "RNN_RELU": "h", "GRU": "zrn", "LSTM": "iofg"}


def knows(cell: Cell) -> bool:
    """Whether ONNX has the cell, and this torch can emit its operator (2.8 or later)."""
    return cell.mode in _GATES and hasattr(torch.onnx, "ops")


def check(cell: Cell, weights: Weights) -> None:
    """Refuse what ONNX does not have, for either exporter.

    Raises:
        RuntimeError: there is no operator for the cell, or the layer is projected.
    """
    if cell.mode not in _GATES:
        raise RuntimeError(f"ONNX has no operator for the cell {cell.mode}")
    if weights.hr is not None:
        raise RuntimeError("ONNX has no operator for an LSTM with projections (proj_size)")


def emit_node(layer: Layer, x: Tensor) -> tuple[Tensor, State]:
    """As :func:`fastrnn.autograd.apply_layer`."""
    cell, (T, B, _) = layer.cell, x.shape
    D, H = layer.D, layer.P
    bias = None
    if layer.weights[0].bias_ih is not None:
        bias = torch.cat([_stacked(layer, "bias_ih"), _stacked(layer, "bias_hh")], 1)
    weights = (_stacked(layer, "ih"), _stacked(layer, "hh"))
    inputs = [x, *weights, bias, None, *(layer.state or ())]
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


def _stacked(layer: Layer, field: str) -> Tensor:
    """One weight of all directions, its gates in ONNX's order."""
    order = [layer.cell.gates.index(gate) for gate in _GATES[layer.cell.mode]]
    gates = [getattr(w, field).chunk(layer.G) for w in layer.weights]
    return torch.stack([torch.cat([each[k] for k in order]) for each in gates])

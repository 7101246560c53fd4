"""Which backend runs a module, and why."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import functional
from fastrnn.dispatch import BackendError, Choice, explain_choice, load_backend
from fastrnn.layer import Layer, rows_of, rows_of_one_step
from fastrnn.modules import RNNBase, RNNCellBase

__all__ = ["explain"]


def explain(module: RNNBase | RNNCellBase, input: Tensor | PackedSequence) -> Choice:
    """The backend that would run ``module(input)`` here and now, and why.

    Where that is torch's own operator, the reason also names the backend of a compiled or exported
    graph.

    Raises:
        TypeError: the module is not a fastrnn layer or cell, or the input is not a tensor.
        ValueError, RuntimeError: dtype or features of the input are not the module's.
        fastrnn.BackendError: a backend was selected by name and cannot run this.

    >>> import torch, fastrnn
    >>> with fastrnn.use_backend("reference"):
    ...     print(fastrnn.explain(fastrnn.GRU(3, 4), torch.randn(5, 2, 3)))
    reference: selected by use_backend; plain torch, one step at a time
    """
    if not isinstance(module, (RNNBase, RNNCellBase)):
        raise TypeError(f"expected a layer or a cell of fastrnn, got {type(module).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    module._check_dimensions(data)
    if isinstance(module, RNNCellBase):
        stack = [[module._weights()]]
        rows = rows_of_one_step(data if data.dim() == 2 else data.unsqueeze(0))
    else:
        stack = module._weights()
        if isinstance(input, PackedSequence):
            rows = rows_of(data, input.batch_sizes)
        else:
            rows = rows_of(module._time_major(data))
    module._check_input(data, stack[0][0].ih)
    layers = [Layer(module._cell, rows, directions, None) for directions in stack]
    stack_sizes = functional.stack_sizes(layers, data)
    dtype = functional.autocast_dtype(data) or data.dtype
    choice = explain_choice(module._cell, dtype, data.device, sizes=stack_sizes)
    if load_backend(choice.backend).kind == "stack":
        compiled = stack_sizes._replace(compiled=True)
        try:
            in_graphs = explain_choice(module._cell, dtype, data.device, sizes=compiled).backend
        except BackendError:
            in_graphs = "an error"
        reason = f"{choice.reason}; under torch.compile or torch.export: {in_graphs}"
        choice = replace(choice, reason=reason)
    return choice

"""Which backend runs a module, and why."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import functional
from fastrnn.dispatch import BackendError, Choice, explain_choice, load_backend
from fastrnn.layer import Rows
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
        B = data.shape[:-1].numel()
        rows = Rows(1, B, B, one_step=True)
    else:
        stack = module._weights()
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes
            rows = Rows(len(sizes), int(sizes[0]), len(data), sizes)
        elif data.dim() == 2:
            rows = Rows(len(data), 1, len(data))
        else:
            T, B = data.shape[:2] if not module.batch_first else data.shape[1::-1]
            rows = Rows(T, B, T * B)
    module._check_input(data, stack[0][0].ih)
    stack_sizes = functional.stack_sizes(module._cell, data, stack, rows)
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

"""Back-propagation through time over windows of a long sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["tbptt"]


def tbptt(
    step: Callable[..., tuple[Any, Any]],
    sequences: Tensor | Sequence[Tensor],
    window: int,
    state: Any = None,
    *,
    dim: int = 0,
) -> Iterator[tuple[Any, Any]]:
    """Truncated back-propagation through time: run ``step`` on one window after another.

    The state is carried from window to window, but no gradient flows back through it, so a backward
    pass needs the memory of one window only. With a single window it is full back-propagation.

    Args:
        step: ``step(*windows, state) -> (result, new state)``.
        sequences: one tensor, or several of the same length along ``dim``; ``step`` gets the same
            part of each.
        window: steps in a window; the last may have fewer.
        state: the initial state: None, a tensor, or any nesting of tensors, such as the ``hx`` of a
            layer.
        dim: the dimension of time, 1 for ``batch_first``.

    Yields:
        The result of each window and the detached state after it. Run backward on the result before
        you advance the iterator if an optimizer changes parameters that ``step`` depends on.

    Raises:
        TypeError: ``sequences`` are not tensors, or ``window`` is not an int.
        ValueError: ``window`` is below 1, the lengths differ, or there is no dimension ``dim``.

    Source: Williams and Peng 1990, "An Efficient Gradient-Based Algorithm for On-Line Training of
    Recurrent Network Trajectories".

    >>> import torch, fastrnn
    >>> gru, x, y = fastrnn.GRU(3, 4), torch.randn(10, 2, 3), torch.randn(10, 2, 4)
    >>> def step(x, y, state):
    ...     output, state = gru(x, state)
    ...     return (output - y).square().mean(), state
    >>> for loss, state in fastrnn.tbptt(step, (x, y), window=4):
    ...     loss.backward()
    """
    sequences = [sequences] if isinstance(sequences, Tensor) else list(sequences)
    for s in sequences:
        if not isinstance(s, Tensor):
            raise TypeError(f"expected sequences of tensors, got {type(s).__name__}")
        if not isinstance(dim, int) or not -s.dim() <= dim < s.dim():
            raise ValueError(f"expected sequences with a dimension {dim}, got {list(s.shape)}")
    lengths = {s.shape[dim] for s in sequences}
    if len(lengths) != 1:
        raise ValueError(f"expected sequences of one length, got {sorted(lengths)}")
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"expected window to be an int, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"expected a window of 1 step or more, got {window}")
    return _windows(step, sequences, window, state, dim)


def _windows(
    step: Callable[..., tuple[Any, Any]],
    sequences: Sequence[Tensor],
    window: int,
    state: Any,
    dim: int,
) -> Iterator[tuple[Any, Any]]:
    for parts in zip(*(s.split(window, dim) for s in sequences), strict=True):
        result, state = step(*parts, state)
        state = tree_map_only(Tensor, Tensor.detach, state)
        yield result, state

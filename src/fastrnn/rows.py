"""The rows of a batch in time-major order: which belong to a step, and which row came before.

A dense batch has ``batch`` rows at every step. A packed one has ``batch_sizes[t]`` at step t, never
more than at the step before, because its sequences are sorted by length: row r of a step is always
sequence r.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["live", "previous", "steps"]


def live(lengths: Tensor, T: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The packed batch in a padded one of sequences of so many steps, of T at most.

    Returns:
        The sequences that have a step, longest first; ``batch_sizes``; and of each packed row the
        place among the rows of the padded batch, ``[T * B]`` or ``[B * T]``.
    """
    ends, order = lengths.sort(descending=True, stable=True)
    t = torch.arange(T, device="cpu").unsqueeze(1)
    alive = t < ends
    B = len(lengths)
    places = torch.add(t, order, alpha=T) if batch_first else torch.add(order, t, alpha=B)
    batch_sizes = alive.sum(1)[: int(ends[0])]
    return order[: int(batch_sizes[0])], batch_sizes, places.masked_select(alive)


def steps(N: int, batch: int, batch_sizes: Tensor | None, reverse: bool) -> list[slice]:
    """The rows of each step, in the order in which the direction meets the steps."""
    if batch_sizes is None:
        sizes = [batch] * (N // batch if batch else 0)
    else:
        # Not tolist(), which torch 2.6 refuses inside a transform.
        sizes = [int(n) for n in batch_sizes.unbind()]
    slices, offset = [], 0
    for n in sizes:
        slices.append(slice(offset, offset + n))
        offset += n
    return slices[::-1] if reverse else slices


def previous(out: Tensor, first: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """For every row of ``out [N, P]`` the value one step earlier in its sequence.

    ``first [B, P]`` is what comes before the first step a sequence takes: its initial state.
    "Earlier" is in the order of the direction, so with ``reverse`` it is the row of step t + 1.
    """
    N, B = out.shape[0], first.shape[0]
    if N == 0:
        return out.clone()
    if batch_sizes is None:
        return torch.cat([out[B:], first]) if reverse else torch.cat([first, out[: N - B]])
    # On the CPU, where the sizes are: nothing waits for a GPU.
    sizes, T = batch_sizes, batch_sizes.shape[0]
    starts = sizes.cumsum(0) - sizes
    t = torch.repeat_interleave(torch.arange(T, device="cpu"), sizes)
    r = torch.arange(N, device="cpu") - starts[t]
    before = t + 1 if reverse else t - 1
    alive = (before >= 0) & (before < T)
    before = before.clamp(0, T - 1)
    alive &= r < sizes[before]
    # Rows of `first` stand behind those of `out` in one gather.
    rows = torch.where(alive, starts[before] + r, N + r)
    if out.is_cuda:
        rows = rows.pin_memory().to(out.device, non_blocking=True)
    return torch.cat([out, first])[rows]

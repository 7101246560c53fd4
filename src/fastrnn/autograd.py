"""One autograd Function behind every cell, direction and backend, and what it does not serve.

A layer is differentiated by its backend's ``backward``. Under vmap it runs once for all samples
where only input and state differ, and otherwise once for each. What else torch does to functions,
forward mode and derivatives of derivatives, it does to the reference, which is plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from fastrnn import operators
from fastrnn.backends import Backend
from fastrnn.cells import Cell, State, Weights
from fastrnn.operators import recording, tracing

__all__ = ["layer", "transformed", "unwrapped"]

PER_DIRECTION = len(Weights.__args__)  # type: ignore[attr-defined]


def layer(
    backend: Backend,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
) -> tuple[Tensor, State]:
    """Run one layer; see :class:`fastrnn.backends.Backend` for the arguments.

    With no gradient to compute, no Function is entered and nothing is saved.
    """
    recorded, in_transform = recording(), transformed()
    if in_transform and not recorded and batch_sizes is not None:
        batch_sizes = unwrapped("batch_sizes", batch_sizes)
    if forward_ad._current_level >= 0 or (recorded and in_transform):
        return _plain(cell, x, weights, state, batch_sizes, batch)
    if recorded:
        # A trace may be trained, and is compared with one that is made without gradients.
        save = tracing() or _differentiable(x, weights, state)
        name = backend.__name__.rpartition(".")[2]
        return operators.layer(name, cell, x, weights, state, batch_sizes, batch, save)
    if in_transform or _differentiable(x, weights, state):
        call = _Call(backend, cell, batch_sizes, batch, len(weights))
        tensors: list[Any] = [x, *chain(*weights), *(state or ())]
        try:
            out, _, *final = _Layer.apply(call, *tensors)
        except RuntimeError:
            # What was made in inference mode cannot be saved, but copied it can.
            if not any(t is not None and t.is_inference() for t in tensors):
                raise
            tensors = [t.clone() if t is not None and t.is_inference() else t for t in tensors]
            out, _, *final = _Layer.apply(call, *tensors)
        return out, tuple(final)
    out, final_state, _ = backend.forward(cell, x, weights, state, batch_sizes, batch, save=False)
    return out, final_state


def _plain(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Weights],
    state: State | None,
    batch_sizes: Tensor | None,
    batch: int,
) -> tuple[Tensor, State]:
    """A layer in torch's own operators."""
    from fastrnn.backends import reference

    out, final, _ = reference.forward(cell, x, weights, state, batch_sizes, batch, save=False)
    return out, final


def transformed() -> bool:
    """Whether tensors may be those of a transform of ``torch.func``, or of forward mode."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def unwrapped(name: str, numbers: Tensor) -> Tensor:
    """Without what transforms wrap tensors in that are made inside them.

    Raises:
        RuntimeError: the numbers are not the same for all samples of vmap.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(numbers):
        if functorch.is_batchedtensor(numbers):
            raise RuntimeError(f"expected {name} that are the same for all samples of vmap")
        numbers = functorch.get_unwrapped(numbers)
    return numbers


def _differentiable(x: Tensor, weights: Sequence[Weights], state: State | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    for direction in weights:
        for w in direction:
            if w is not None and w.requires_grad:
                return True
    return state is not None and any(s.requires_grad for s in state)


@dataclass(eq=False, slots=True)
class _Call:
    """What no transform looks into."""

    backend: Backend
    cell: Cell
    batch_sizes: Tensor | None
    batch: int
    D: int

    def weights_and_state(self, tensors: Sequence[Tensor]) -> tuple[list[Weights], State | None]:
        end = self.D * PER_DIRECTION
        weights = [
            cast(Weights, tuple(tensors[k : k + PER_DIRECTION]))
            for k in range(0, end, PER_DIRECTION)
        ]
        return weights, tuple(tensors[end:]) or None


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        # torch's own also binds arguments to names, which takes longer than a short layer.
        args = unwrap_dead_wrappers(args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class _Layer(_Function):
    """The arguments after ``call`` are x, each direction's five weights, and the states if any."""

    @staticmethod
    def forward(call: _Call, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, state = call.weights_and_state(tensors)
        out, final, saved = call.backend.forward(
            call.cell, x.contiguous(), weights, state, call.batch_sizes, call.batch, save=True
        )
        return out, cast(Tensor, saved), *final

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, x, *tensors = inputs
        out, saved, *_ = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, out, saved, *tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None, *dfinal: Tensor | None) -> Any:
        _, *needed = ctx.needs_input_grad
        if dout is None and all(g is None for g in dfinal):
            return None, *(None for _ in needed)
        if forward_ad._current_level >= 0:
            x, _, _, *rest = ctx.saved_tensors
            return None, *_gradients(ctx.call, x, rest, (dout, *dfinal), needed)
        # Mostly, nobody differentiates again, nor has many gradients at once.
        again = torch.is_grad_enabled() or transformed()
        run = _Reverse.apply if again else _Reverse.forward
        try:
            grads = run(ctx.call, tuple(needed), dout, *dfinal, *ctx.saved_tensors)
        except (ValueError, RuntimeError):
            _refuse_batched(dout, *dfinal)
            raise
        return None, *grads

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], call: _Call, *tensors: Tensor) -> Any:
        weight_dims = in_dims[2 : 2 + call.D * PER_DIRECTION]
        if call.batch_sizes is not None or any(dim is not None for dim in weight_dims):
            return _each(_Layer, info, in_dims, call, *tensors)
        # Samples are sequences like any other.
        V, B = info.batch_size, call.batch
        many = _Call(call.backend, call.cell, None, V * B, call.D)
        out, saved, *final = _Layer.apply(
            many,
            *(
                t if t is None or k in range(1, 1 + len(weight_dims)) else _folded(t, dim, V)
                for k, (t, dim) in enumerate(zip(tensors, in_dims[1:], strict=True))
            ),
        )
        D, N, *kept = saved.shape
        rows = saved.view(D, N // max(1, V * B), V, B, *kept).movedim(2, 0).flatten(2, 3)
        apart = [t.unflatten(-2, (V, B)).movedim(-3, 0) for t in (out, *final)]
        outputs = (apart[0], rows, *apart[1:])
        return outputs, (0,) * len(outputs)


def _folded(t: Tensor, dim: int | None, V: int) -> Tensor:
    """``[*, B, features]`` of all samples as ``[*, V * B, features]``."""
    t = t.unsqueeze(0).expand(V, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, -3).flatten(-3, -2)


class _Reverse(_Function):
    """The gradients that are needed.

    The arguments after ``needed`` are dout, that of each final state, and what _Layer saved.
    """

    @staticmethod
    def forward(
        call: _Call, needed: tuple[bool, ...], dout: Tensor | None, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        states = len(call.cell.states)
        dfinal, (x, out, saved, *rest) = tensors[:states], tensors[states:]
        weights, state = call.weights_and_state(rest)
        # Samples of vmap need not lie in a row.
        x, out, saved = x.contiguous(), out.contiguous(), saved.contiguous()
        layer = (call.cell, x, weights, state, call.batch_sizes, call.batch)
        with torch.no_grad():
            return call.backend.backward(*layer, out, saved, dout, dfinal, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call, ctx.needed, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *dgrads: Tensor | None) -> Any:
        call, states = ctx.call, 1 + len(ctx.call.cell.states)
        dys, (x, _, _, *rest) = ctx.saved_tensors[:states], ctx.saved_tensors[states:]
        # What is not there is no argument of a function to differentiate.
        tensors = (x, *rest, *dys)
        there = [t is not None for t in tensors]

        def gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
            values = iter(arguments)
            x, *others = [cast(Tensor, next(values) if has else None) for has in there]
            rest, dys = others[:-states], others[-states:]
            return tuple(g for g in _gradients(call, x, rest, dys, ctx.needed) if g is not None)

        pull = torch.func.vjp(gradients, *(t for t in tensors if t is not None))[1]
        with _own_dtype(x):
            found = iter(pull(tuple(g for g in dgrads if g is not None)))
        dx, *others = [next(found) if has else None for has in there]
        return None, None, *others[-states:], dx, None, None, *others[:-states]

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return _each(_Reverse, info, in_dims, *args)


def _gradients(
    call: _Call,
    x: Tensor,
    rest: Sequence[Tensor],
    dys: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """What _Reverse computes, in torch's own operators."""
    there = [t is not None for t in (x, *rest)]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = iter(inputs)
        x, *rest = [cast(Tensor, next(values) if has else None) for has in there]
        weights, state = call.weights_and_state(rest)
        out, final = _plain(call.cell, x, weights, state, call.batch_sizes, call.batch)
        return tuple(y for y, g in zip((out, *final), dys, strict=True) if g is not None)

    pull = torch.func.vjp(run, *(t for t in (x, *rest) if t is not None))[1]
    with _own_dtype(x):
        found = iter(pull(tuple(g for g in dys if g is not None)))
    grads = [next(found) if has else None for has in there]
    return [g if need else None for g, need in zip(grads, needed, strict=True)]


def _own_dtype(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast, which would lower the precision of a layer's derivatives."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _each(
    function: type[torch.autograd.Function], info: Any, in_dims: Sequence[Any], *args: Any
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """A rule for vmap: once for each sample."""

    def sample(k: int) -> list[Any]:
        return [
            a.select(dim, k) if isinstance(dim, int) else a
            for a, dim in zip(args, in_dims, strict=True)
        ]

    if info.batch_size == 0:
        raise RuntimeError("expected vmap over at least one sample of a layer, got none")
    results = [function.apply(*sample(k)) for k in range(info.batch_size)]
    outputs = tuple(
        None if each[0] is None else torch.stack(each) for each in zip(*results, strict=True)
    )
    return outputs, tuple(None if t is None else 0 for t in outputs)


def _refuse_batched(*grads: Tensor | None) -> None:
    """No backend knows the tensors of ``is_grads_batched=True``; each fails in its own words."""
    if any(g is not None and "Batched" in str(torch._C._dispatch_keys(g)) for g in grads):
        raise RuntimeError("fastrnn's layers have no batched gradients (is_grads_batched=True)")

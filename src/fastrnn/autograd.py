"""One autograd Function for every cell, direction and backend, and when it is used.

A layer is differentiated by its backend's ``backward``. Under vmap it runs once for all samples if
only input and state differ between them, and otherwise once for each. For forward mode and for
derivatives of derivatives torch differentiates the reference, which is written in its operators.

A Function receives a template, which is a layer without its tensors, and the tensors beside it:
torch must see them to differentiate, save and transform them, and a context must not keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from fastrnn import operators
from fastrnn.backends import LayerBackend
from fastrnn.capture import (
    is_forward_ad,
    is_jit_tracing,
    is_transforming,
    unwrapped,
)
from fastrnn.cells import State
from fastrnn.layer import Layer, filled

__all__ = ["apply_layer"]


def apply_layer(
    backend: LayerBackend, layer: Layer, x: Tensor, capturing: bool
) -> tuple[Tensor, State]:
    """Run one layer on contiguous ``x``; see :class:`fastrnn.backends.LayerBackend`.

    Where no gradient is needed, no Function is entered and nothing is saved.

    Args:
        capturing: the value of :func:`fastrnn.capture.is_capturing`, evaluated once per call.
    """
    transforming = is_transforming()
    if transforming:
        if not capturing and layer.rows.batch_sizes is not None:
            sizes = unwrapped("batch_sizes", layer.rows.batch_sizes)
            rows = layer.rows._replace(batch_sizes=sizes)
            layer = Layer(layer.cell, rows, layer.weights, layer.state)
        if capturing or is_forward_ad():
            return _reference(layer, x)
    if capturing:
        # A trace may be trained, and torch compares it with one made without gradients.
        save = is_jit_tracing() or _differentiable(layer, x)
        name = backend.__name__.rpartition(".")[2]
        return operators.call_layer_op(name, layer, x, save)
    if transforming or _differentiable(layer, x):
        template, tensors = layer.without_tensors(), [x, *layer.tensors()]
        try:
            out, _, *final = _LayerForward.apply(backend, template, *tensors)
        except RuntimeError:
            # Tensors made in inference mode cannot be saved, but their copies can.
            if not any(t is not None and t.is_inference() for t in tensors):
                raise
            copies = [t.clone() if t is not None and t.is_inference() else t for t in tensors]
            out, _, *final = _LayerForward.apply(backend, template, *copies)
        return out, tuple(final)
    out, state, _ = backend.forward(layer, x, save=False)
    return out, state


def _reference(layer: Layer, x: Tensor) -> tuple[Tensor, State]:
    """The layer in torch's own operators."""
    from fastrnn.backends import reference  # not by name: torch's compiler traces this import

    out, final, _ = reference.forward(layer, x, save=False)
    return out, final


def _differentiable(layer: Layer, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    for direction in layer.weights:
        for w in direction:
            if w is not None and w.requires_grad:
                return True
    return layer.state is not None and any(s.requires_grad for s in layer.state)


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, backend: LayerBackend, template: Layer, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(backend, template, *args)  # type: ignore[no-untyped-call]
        # torch's own apply also binds arguments to names, which takes longer than a short layer.
        args = unwrap_dead_wrappers(args)
        return super(torch.autograd.Function, cls).apply(backend, template, *args)  # type: ignore[misc]


class _LayerForward(_Function):
    """``(backend, template, x, *tensors) -> (out, saved, *final)``.

    The template is the layer without its tensors, which follow in the order of ``Layer.tensors``.
    """

    @staticmethod
    def forward(
        backend: LayerBackend, template: Layer, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        layer = template.with_tensors(tensors)
        out, final, saved = backend.forward(layer, x.contiguous(), save=True)
        return out, cast(Tensor, saved), *final

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.template, x, *tensors = inputs
        out, saved, *_ = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, out, saved, *tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None, *dfinal: Tensor | None) -> Any:
        backend, template = ctx.backend, ctx.template
        _, _, *needed = ctx.needs_input_grad
        if dout is None and all(g is None for g in dfinal):
            return None, None, *(None for _ in needed)
        x, out, saved, *tensors = ctx.saved_tensors
        if is_forward_ad():
            return None, None, *_gradients(template, x, tensors, (dout, *dfinal), needed)
        # The usual case: no double backward, and no transform.
        direct = not torch.is_grad_enabled() and not is_transforming()
        run = _LayerBackward.forward if direct else _LayerBackward.apply
        args = (dout, *dfinal, x, out, saved, *tensors)
        try:
            grads = run(backend, template, tuple(needed), *args)
        except (ValueError, RuntimeError):
            _refuse_batched(dout, *dfinal)
            raise
        return None, None, *grads

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], backend: LayerBackend, template: Layer, *tensors: Tensor
    ) -> Any:
        x, *rest = tensors
        x_dim, *dims = in_dims[2:]
        num_weights = len(template.tensors())  # the states follow
        shared_weights = all(dim is None for dim in dims[:num_weights])
        rows, V = template.rows, info.batch_size
        if rows.batch_sizes is not None or not shared_weights:
            return _each_sample(_LayerForward, info, in_dims, backend, template, *tensors)
        # The samples become further sequences of one batch.
        B = rows.B
        wide = rows._replace(B=V * B, N=V * rows.N)
        states = zip(rest[num_weights:], dims[num_weights:], strict=True)
        out, saved, *final = _LayerForward.apply(
            backend,
            Layer(template.cell, wide, template.weights, None),
            _folded(x, x_dim, V),
            *rest[:num_weights],
            *(_folded(s, dim, V) for s, dim in states),
        )
        D, N, *saved_sizes = saved.shape
        saved = saved.view(D, N // max(1, V * B), V, B, *saved_sizes).movedim(2, 0).flatten(2, 3)
        out, *final = [t.unflatten(-2, (V, B)).movedim(-3, 0) for t in (out, *final)]
        outputs = (out, saved, *final)
        return outputs, (0,) * len(outputs)


def _folded(t: Tensor, dim: int | None, V: int) -> Tensor:
    """``[*, B, features]`` of all samples as ``[*, V * B, features]``."""
    t = t.unsqueeze(0).expand(V, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, -3).flatten(-3, -2)


class _LayerBackward(_Function):
    """``(backend, template, needed, dout, *dfinal, x, out, saved, *tensors) -> gradients``.

    The gradients that are needed are those of x and ``tensors``; the others are None.
    """

    @staticmethod
    def forward(
        backend: LayerBackend, template: Layer, needed: tuple[bool, ...], *args: Any
    ) -> tuple[Tensor | None, ...]:
        (dout, *dfinal), (x, out, saved, *tensors) = _split(template, args)
        # Samples of vmap need not be contiguous.
        x, out, saved = x.contiguous(), out.contiguous(), saved.contiguous()
        layer = template.with_tensors(tensors)
        with torch.no_grad():
            return backend.backward(layer, x, out, saved, dout, dfinal, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, ctx.template, ctx.needed, *args = inputs
        ctx.save_for_backward(*args)

    @staticmethod
    def backward(ctx: Any, *dgrads: Tensor | None) -> Any:
        """Double backward: torch differentiates the gradients of the reference."""
        template, needed = ctx.template, ctx.needed
        cotangents, (x, _, _, *tensors) = _split(template, ctx.saved_tensors)
        arguments = (*cotangents, x, *tensors)
        present = [t is not None for t in arguments]

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            cotangents, (x, *tensors) = _split(template, filled(present, values))
            grads = _gradients(template, x, tensors, cotangents, needed)
            return tuple(g for g in grads if g is not None)

        pull = torch.func.vjp(gradients, *(t for t in arguments if t is not None))[1]
        with _without_autocast(x):
            grads = pull(tuple(g for g in dgrads if g is not None))
        dcotangents, (dx, *dtensors) = _split(template, filled(present, grads))
        return None, None, None, *dcotangents, dx, None, None, *dtensors

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return _each_sample(_LayerBackward, info, in_dims, *args)


def _split(template: Layer, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The cotangents of the output and the final states, and what follows them."""
    count = 1 + len(template.cell.states)
    return args[:count], args[count:]


def _gradients(
    template: Layer,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The result of _LayerBackward in torch's own operators."""
    arguments = (x, *tensors)
    present = [t is not None for t in arguments]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        x, *tensors = filled(present, values)
        out, final = _reference(template.with_tensors(tensors), x)
        return tuple(y for y, g in zip((out, *final), cotangents, strict=True) if g is not None)

    pull = torch.func.vjp(run, *(t for t in arguments if t is not None))[1]
    with _without_autocast(x):
        grads = filled(present, pull(tuple(g for g in cotangents if g is not None)))
    return [g if need else None for g, need in zip(grads, needed, strict=True)]


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast would lower the precision of a layer's derivatives."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _each_sample(
    function: type[torch.autograd.Function], info: Any, in_dims: Sequence[Any], *args: Any
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """A rule for vmap: one call for each sample."""

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
    """Refuse the gradients of ``is_grads_batched=True``, which no backend supports.

    Each backend would raise a different error.
    """
    if any(g is not None and "Batched" in str(torch._C._dispatch_keys(g)) for g in grads):
        raise RuntimeError("fastrnn's layers have no batched gradients (is_grads_batched=True)")

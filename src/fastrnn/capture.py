"""What captures or transforms the calls of a layer here and now, and what runs a layer then.

| active | predicates that are true | what runs a layer |
|---|---|---|
| nothing | none | its backend; behind an autograd Function where a gradient is needed |
| ``torch.func`` | transforming | the same Function; the reference in place of ``torch`` |
| forward-mode AD | transforming, forward_ad | the reference, which torch differentiates |
| ``torch.compile`` | capturing | ``torch.ops.fastrnn.layer``, pinned to a layer backend |
| ``torch.export`` | capturing, exporting | the same, with an explicit state of zeros |
| ``torch.jit.trace`` | capturing, jit_tracing | the same, always trainable; or torch's operator |
| ``torch.onnx``, dynamo | capturing, onnx_exporting | an ONNX node; torch's operator before 2.8 |
| ``torch.onnx``, tracing | the same, jit_tracing | torch's operator |
| FakeTensorMode, ``make_fx`` | capturing | ``torch.ops.fastrnn.layer``; or torch's operator |
| capture under ``torch.func`` | capturing, transforming | the reference |

A packed batch and ``lengths`` run outside the graphs of ``torch.compile``
(:func:`run_outside_graph`), and cannot be exported (:func:`check_not_exporting`). ``torch.fx``
keeps a module as one node (:func:`fx_node`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

__all__ = [
    "check_not_exporting",
    "fx_node",
    "is_capturing",
    "is_exporting",
    "is_forward_ad",
    "is_jit_tracing",
    "is_onnx_exporting",
    "is_transforming",
    "no_script_error",
    "run_outside_graph",
    "unwrapped",
]


# Evaluated in every call of a layer, where names of this module are faster than attributes.
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_are_transforms_active = torch._C._are_functorch_transforms_active


def is_capturing() -> bool:
    """Whether operators are captured in a graph, or only the shapes of their results computed."""
    return _is_compiling() or _is_tracing() or _num_dispatch_modes() > 0


def is_jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` is active."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def is_exporting() -> bool:
    """Whether ``torch.export`` is active; False with torch before 2.7, which does not tell."""
    ask = getattr(torch.compiler, "is_exporting", None)
    return ask is not None and ask()


def is_onnx_exporting() -> bool:
    """Whether one of torch's two ONNX exporters is active."""
    return torch.onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result, which imports the compiler. Inside a graph that is being
# compiled the answer would be False.
is_onnx_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_forward_ad() -> bool:
    """Whether forward-mode AD is active."""
    return forward_ad._current_level >= 0


def is_transforming() -> bool:
    """Whether a transform of ``torch.func``, or forward-mode AD, is active."""
    return _are_transforms_active() or forward_ad._current_level >= 0


def unwrapped(name: str, tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of active transforms.

    Raises:
        RuntimeError: its values differ between the samples of vmap.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            raise RuntimeError(f"expected {name} that are the same for all samples of vmap")
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def check_not_exporting() -> None:
    """Refuse a packed batch or ``lengths`` under an exporter.

    Raises:
        RuntimeError: an exporter is active.
    """
    where = "export to ONNX" if is_onnx_exporting() else "torch.export" if is_exporting() else None
    if where:
        raise RuntimeError(
            f"{where}: expected a padded input without lengths, got a packed one or lengths"
        )


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def run_outside_graph(
    function: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
) -> _Result:
    """Run a function eagerly under ``torch.compile``: a graph would specialise on the lengths."""
    # torch.compiler.disable takes long beside a short layer: skip it unless Dynamo is active.
    compiling = torch.compiler.is_dynamo_compiling()
    if not compiling and torch._C._dynamo.eval_frame.get_eval_frame_callback() is None:
        return function(*args, **kwargs)
    if function not in _disabled:
        _disabled[function] = torch.compiler.disable(function)
    return cast(_Result, _disabled[function](*args, **kwargs))


_disabled: dict[Callable[..., Any], Any] = {}
# As torch.compiler.disable, which imports the compiler.
run_outside_graph._torchdynamo_disable = True  # type: ignore[attr-defined]
run_outside_graph._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "fastrnn compiles layers with padded inputs and without lengths"
)


def fx_node(module: nn.Module, own_forward: bool, input: fx.Proxy, *args: Any) -> fx.Proxy:
    """A call of a module as one node of a ``torch.fx`` graph.

    torch.fx traces into all modules but torch.nn's. The node will run the whole module, so nothing
    may run before or after ``forward`` that fx has traced as well.

    Args:
        own_forward: whether the class has fastrnn's own ``forward``.
    """
    tracer: Any = input.tracer
    hooks = module._forward_pre_hooks or module._forward_hooks
    if not own_forward or hooks or module is tracer.root:
        raise RuntimeError(
            f"torch.fx: expected a {type(module).__name__} inside a model, without hooks and with "
            "fastrnn's own forward; a Tracer whose is_leaf_module accepts fastrnn.RNNBase and "
            "RNNCellBase supports both"
        )
    while args and args[-1] is None:
        args = args[:-1]
    node: fx.Proxy = tracer.create_proxy(
        "call_module", tracer.path_of_module(module), (input, *args), {}
    )
    return node


def no_script_error() -> RuntimeError:
    return RuntimeError(
        "torch.jit.script does not support fastrnn layers: use torch.jit.trace or torch.export, "
        "or fastrnn.revert(model), which makes them torch.nn's"
    )

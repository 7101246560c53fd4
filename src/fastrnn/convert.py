"""Conversion of models that were written for torch.nn to fastrnn's modules, and back.

A module stays the same object and changes its class. So its parameters, hooks and parametrisations
stay, and all references to it remain valid, including those of tied modules and optimizers.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastrnn import modules

__all__ = ["convert", "patched", "revert"]

Model = TypeVar("Model", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: modules.RNNCell,
    nn.LSTMCell: modules.LSTMCell,
    nn.GRUCell: modules.GRUCell,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(model: Model) -> Model:
    """Make every recurrent layer and cell of torch.nn in ``model`` the fastrnn one, in place.

    ``model`` itself and its registered submodules at any depth are converted.

    Returns:
        ``model`` itself.

    Warns:
        UserWarning: names the modules that cannot be converted: subclasses, whose methods may rely
            on torch's, complex modules, and modules that ``torch.jit`` has compiled or traced.

    Raises:
        TypeError: ``model`` is not a module.

    >>> import torch, fastrnn
    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.LSTM(4, 8))
    >>> fastrnn.convert(model)
    Sequential(
      (0): Embedding(9, 4)
      (1): LSTM(4, 8)
    )
    >>> type(model[1])
    <class 'fastrnn.modules.layers.LSTM'>
    """
    return _exchanged(model, _OURS, "convert")


def revert(model: Model) -> Model:
    """Make every fastrnn module in ``model`` its counterpart of torch.nn, in place.

    Returns:
        ``model`` itself.

    Warns:
        UserWarning: names the modules that cannot be reverted: subclasses, and layers around cells
            that torch lacks.

    Raises:
        TypeError: ``model`` is not a module.
    """
    return _exchanged(model, _THEIRS, "revert")


def _exchanged(model: Model, classes: dict[type[nn.Module], type[nn.Module]], verb: str) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    ours = (modules.RNNBase, modules.RNNCellBase)
    left = []
    for name, module in model.named_modules():
        own = type(module)
        if parametrize.is_parametrized(module):  # which gives each module a class of its own
            own = own.__bases__[0]
        why = None
        if own in classes and "forward" in vars(module):
            why = "has a forward method of its own"
        elif classes is _OURS and own in classes and _complex(module):
            why = "is complex, which fastrnn does not support"
        elif own in classes:
            _become(module, classes[own])
        elif isinstance(module, torch.jit.ScriptModule):
            if module.original_name in (c.__name__ for c in classes):
                why = "was compiled or traced by torch.jit"
        elif isinstance(module, ours):
            if classes is _THEIRS:
                why = "is a subclass, or has a cell that torch lacks"
        elif classes is _OURS and isinstance(module, nn.RNNBase | nn.RNNCellBase):
            why = "is a subclass, which may rely on the inside of torch's class"
        if why:
            left.append(f"{name or 'the model'} ({type(module).__name__}) {why}")
    if left:
        warnings.warn(f"fastrnn did not {verb} all: {'; '.join(left)}", stacklevel=3)
    return model


def _complex(module: nn.Module) -> bool:
    return any(p.is_complex() for p in module.parameters())


def _become(module: nn.Module, new: type[nn.Module]) -> None:
    old = type(module)
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(old).items() if k not in ("__dict__", "__weakref__")}
        new = type(f"Parametrized{new.__name__}", (new,), own)
    # torch's layers keep a list of their weights, fastrnn's look them up.
    vars(module).pop("_flat_weights", None)
    vars(module).pop("_flat_weight_refs", None)
    module.__class__ = new
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


@contextmanager
def patched() -> Iterator[None]:
    """Replace ``torch.nn.LSTM`` and its siblings by fastrnn's inside the block.

    Code that imported the classes by name before the block keeps torch's. The block holds for all
    threads, and blocks may overlap. Inside it, torch layers made before cannot be pickled, and are
    not instances of ``torch.nn.LSTM``.

    >>> import torch, fastrnn
    >>> with fastrnn.patched():
    ...     model = torch.nn.Sequential(torch.nn.LSTM(4, 8))
    >>> type(model[0])
    <class 'fastrnn.modules.layers.LSTM'>
    """
    _patch(+1)
    try:
        yield
    finally:
        _patch(-1)


_blocks = 0
_lock = threading.Lock()


def _patch(change: int) -> None:
    global _blocks
    with _lock:
        _blocks += change
        for theirs, ours in _OURS.items():
            for place in (nn, nn.modules, nn.modules.rnn):
                setattr(place, theirs.__name__, ours if _blocks else theirs)

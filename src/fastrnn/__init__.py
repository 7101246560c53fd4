"""fastrnn: drop-in recurrent layers for PyTorch on fused kernels.

Public are the names below, and for authors of cells :mod:`fastrnn.cells` and
:mod:`fastrnn.functional`.

>>> import torch, fastrnn
>>> lstm = fastrnn.LSTM(input_size=8, hidden_size=16)
>>> output, (h_n, c_n) = lstm(torch.randn(5, 2, 8))
"""

from importlib.metadata import version

from fastrnn import diagnostics, init
from fastrnn.bptt import tbptt
from fastrnn.convert import convert, patched, revert
from fastrnn.dispatch import BackendError, empty_cache, use_backend
from fastrnn.explain import explain
from fastrnn.modules import (
    GRU,
    LSTM,
    RNN,
    GRUCell,
    LSTMCell,
    RNNBase,
    RNNCell,
    RNNCellBase,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendError",
    "GRUCell",
    "LSTMCell",
    "RNNBase",
    "RNNCell",
    "RNNCellBase",
    "convert",
    "diagnostics",
    "empty_cache",
    "explain",
    "init",
    "patched",
    "revert",
    "tbptt",
    "use_backend",
]

__version__ = version("fastrnn")

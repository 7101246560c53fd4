"""torch.nn's contract for recurrent layers and cells, and nothing else.

``layers.py`` and ``cells.py`` have the modules, ``compat.py`` the methods that code written for
torch.nn's layers calls, ``arguments.py`` the checks of their arguments, and ``lengths.py`` padded
batches with ``lengths``.
"""

from fastrnn.modules.cells import GRUCell, LSTMCell, RNNCell, RNNCellBase
from fastrnn.modules.layers import GRU, LSTM, RNN, RNNBase

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNBase",
    "RNNCell",
    "RNNCellBase",
]

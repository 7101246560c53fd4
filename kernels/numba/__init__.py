"""The Numba kernels: nothing is imported here, since an import of Numba takes longer than torch's.

``simd.py`` has vectors and the register tile, ``cells.py`` the arithmetic of a step,
``sequence.py`` the loop over time, ``launch.py`` the tensors and threads.
"""

MODES = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")
"""The cells of cells.py."""

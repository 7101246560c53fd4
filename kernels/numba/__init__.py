"""The Numba kernels. Nothing is imported here, since importing Numba takes longer than torch.

``simd.py`` has vectors and the register tile, ``cells.py`` the arithmetic of a step,
``sequence.py`` the loop over time, ``launch.py`` the tensors and threads.
"""

MODES = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")
"""The cells of cells.py."""

"""The kernels that are written in Python: those of the Triton and the Numba backend.

The folder ``kernels/`` of the source tree is installed as ``fastrnn.kernels``; import it by that
name only. The C++ kernels are in ``csrc/``.
"""

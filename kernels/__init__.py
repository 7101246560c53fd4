"""Kernels that are written in Python: the Triton and Numba backends' will be here.

The folder ``kernels/`` of the source tree is installed as ``fastrnn.kernels``; import it by that
name only. The C++ kernels are in ``csrc/``.
"""

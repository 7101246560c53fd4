"""Kernels that are written in Python: home of the Triton and Numba backends' device code.

The folder ``kernels/`` of the source tree is installed as ``fastrnn.kernels``; import it by that
name only. The C++ kernels are in ``csrc/``.
"""

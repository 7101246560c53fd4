"""Triton kernels: the recurrence of a layer on a GPU, forward and backward.

``cells.py`` has the arithmetic of one step, ``sequence.py`` the loop over time for any cell, and
``launch.py`` the tensors and launches of a plan. ``plans.py`` and ``table.py`` define how a layer
is divided among programs. ``aot.py`` compiles the kernels without a GPU and measures them, and
``__main__.py`` is its command line. All but ``plans.py``, ``table.py`` and ``__main__.py`` import
triton.
"""

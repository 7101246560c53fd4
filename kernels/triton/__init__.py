"""Triton kernels: the recurrence of a layer on a GPU, forward and in reverse.

``cells.py`` is the arithmetic of one step, ``sequence.py`` the loop over time for any cell, and
``launch.py`` the tensors and launches of a plan. ``plans.py`` and ``table.py`` say how a layer is
divided among programs, and ``aot.py`` what that takes. All but ``plans.py`` and ``table.py`` import
triton.
"""

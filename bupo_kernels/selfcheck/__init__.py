"""The self-check: whether the GPU kernels are right on the card at hand, found out there once and kept on record.

``decision.py`` answers what ``dispatch.py`` asks: may ``backend="auto"`` take this backend here? It reads the record of the card
(``records.py``: one JSON file a ``card.py: Card``), and where that has no verdict, has a process of its own run ``problems.py``,
which holds results against float64 by ``numerics.py``. ``python -m bupo_kernels.selfcheck`` does so by hand, and prints a table.
"""

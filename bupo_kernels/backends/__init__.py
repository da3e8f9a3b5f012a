"""Implementations of the ops. A backend imports nothing above this folder; ``dispatch.py`` chooses among them."""

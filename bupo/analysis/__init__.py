"""Entropy flow, ΔH and the boundary layer of a causal language model, from its own responses."""

from bupo.analysis.blocks import BlockStates, residual_points
from bupo.analysis.boundary import find_boundary, suggest
from bupo.analysis.collect import analyze
from bupo.analysis.heatmap import Heatmap, heat_maps
from bupo.analysis.statistics import Curve, Statistics, read_statistics, write_statistics

__all__ = [
    "BlockStates",
    "Curve",
    "Heatmap",
    "Statistics",
    "analyze",
    "find_boundary",
    "heat_maps",
    "read_statistics",
    "residual_points",
    "suggest",
    "write_statistics",
]

"""The layers of a language model read as policies: of texts, or entropy flow, ΔH and the boundary layer of its responses."""

from bupo.analysis.blocks import BlockStates, residual_points
from bupo.analysis.boundary import find_boundary, suggest
from bupo.analysis.collect import analyze
from bupo.analysis.heatmap import Heatmap, heat_maps
from bupo.analysis.report import Report
from bupo.analysis.statistics import Curve, Statistics, read_statistics, write_statistics
from bupo.analysis.translators import Translators, fit_translators
from bupo.analysis.views import read_texts

__all__ = [
    "BlockStates",
    "Curve",
    "Heatmap",
    "Report",
    "Statistics",
    "Translators",
    "analyze",
    "find_boundary",
    "fit_translators",
    "heat_maps",
    "read_statistics",
    "read_texts",
    "residual_points",
    "suggest",
    "write_statistics",
]

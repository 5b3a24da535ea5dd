"""What the layers of a model do on their tiles: clipping, saturation, signal and noise, weights."""

from triton_analog.analysis.results import Analysis, LayerAnalysis, SliceAnalysis
from triton_analog.analysis.run import analyze

__all__ = ["Analysis", "LayerAnalysis", "SliceAnalysis", "analyze"]

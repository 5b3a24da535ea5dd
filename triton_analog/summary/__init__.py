"""How much of a model is on tiles, how many tiles that takes, and what it computes."""

from triton_analog.summary.results import LayerSummary, Summary
from triton_analog.summary.run import analog_summary

__all__ = ["LayerSummary", "Summary", "analog_summary"]

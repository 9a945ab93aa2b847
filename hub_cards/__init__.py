"""Measured results -> model cards and reports. Nothing in them is typed in by hand."""

from .card import final_accuracy, write_card
from .comparison import write_comparison

__all__ = ["final_accuracy", "write_card", "write_comparison"]

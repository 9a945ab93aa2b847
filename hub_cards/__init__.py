"""Measured results -> model cards. Nothing in a card is typed in by hand."""

from .card import final_accuracy, write_card

__all__ = ["final_accuracy", "write_card"]

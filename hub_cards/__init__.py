"""Measured results -> model cards. Nothing in a card is typed in by hand."""

from .card import write_card

__all__ = ["write_card"]

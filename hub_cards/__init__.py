"""Measured results -> model cards and reports. Nothing in them is typed in by hand."""

from importlib import import_module

# Imported on demand: `python -m hub_cards --help` and a mistyped option are answered at once.
_HOMES = {"final_accuracy": "dls_training.tasks", "write_card": "hub_cards.card"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

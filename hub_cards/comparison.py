"""Measured arms, side by side -> the report of `reproduce.py`."""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from .card import TEMPLATES, markdown_table


def write_comparison(path: Path, **fields) -> None:
    """Writes the report.

    Args:
        path: The README.md of a results folder.
        **fields: What templates/comparison.md names.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["table"] = markdown_table
    template = environment.from_string((TEMPLATES / "comparison.md").read_text(encoding="utf-8"))
    path.write_text(template.render(fields), encoding="utf-8")

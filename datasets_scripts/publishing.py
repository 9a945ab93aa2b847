"""What a dataset repository on the Hub holds of an export."""

import yaml

from .corpus import Corpus
from .exporting import report_in_card
from .hub import HubRepository, Publication

PARTS = {"README.md": "dataset card", "data/*.parquet": "clips"}


def export_of(corpus: Corpus) -> Publication:
    """The publication that exports of a corpus are, and that replaces no other corpus's."""

    def found_instead(repository: HubRepository) -> str | None:
        card = repository.fetch("README.md")
        try:
            report = report_in_card(card) if card else None
        except (ValueError, yaml.YAMLError):
            report = None
        found = report.get("corpus") if isinstance(report, dict) else None
        return None if found == corpus.name else f"one of {found}" if found else "none"

    return Publication("dataset", PARTS, f"an export of {corpus.name}", found_instead)

"""Writes the benchmarks' CSVs into the tables of docs/speed.md, between their markers.

python benchmarks/report.py
"""

import argparse
import csv
import re
from pathlib import Path

from measuring import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "speed.md"
MARKED = re.compile(r"(<!-- (\w+)\.csv -->\n).*?(<!-- end -->)", re.DOTALL)


def number(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def with_spread(line: dict, name: str) -> str:
    return f"{number(line[name])} ({number(line[f'{name}_min'])}–{number(line[f'{name}_max'])})"


def cells(line: dict) -> list[str]:
    """What was measured: its ratio, or its seconds and its rate, and what it was to reach."""
    line = {name: text for name, text in line.items() if text}
    measured = f"**{with_spread(line, 'ratio')}**" if "ratio" in line else ""
    if "seconds" in line:
        measured = f"{with_spread(line, 'seconds')} s"
    rate = f"{number(line['rate'])} {line.get('unit', '')}".rstrip() if "rate" in line else ""
    if "share_of_ceiling" in line:
        rate += f", {number(line['share_of_ceiling'])} of {line['ceiling']}"
    return [line["what"], measured, rate, line.get("reach", "")]


def table(path: Path) -> str:
    """A benchmark's lines as Markdown, and where they come from."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = [["what", "median (smallest–largest)", "rate", "reach"], [":---"] * 4, *map(cells, lines)]
    origin = lines[0]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"{text}\n\n`{origin['command']}`: {origin['hardware']}, {origin['threads']} threads, "
        f"torch {origin['torch']}, commit {origin['commit']}.\n"
    )


def filled(document: str) -> str:
    """The document with every marked table as its CSV has it."""
    folder = REPOSITORY / "benchmarks"
    return MARKED.sub(lambda found: found[1] + table(folder / f"{found[2]}.csv") + found[3], document)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

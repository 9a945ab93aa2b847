"""Texts of strangers in Markdown: what a class, a title or a command holds stays text, in its line and its cell.

Cards and reports are rendered by `rendered`, where every `{{ expression }}` is escaped that is not `Markdown` already.
"""

import re

from jinja2 import Environment, StrictUndefined, Undefined

_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x00\x1c-\x1e\x85\u2028\u2029]\s*")


class Markdown(str):
    """A text that is Markdown, and is not escaped again."""

    __slots__ = ()


def escaped(value) -> Markdown:
    """A value as text in one line that is no HTML, link, code or end of a table's cell; Markdown as it is."""
    if isinstance(value, Markdown):
        return value
    text = _LINE_BREAKS.sub(" ", str(value)).replace("`", "'")
    return Markdown(text.replace("<", "&lt;").replace("|", "\\|").replace("](", "]\\("))


def code(text: str) -> Markdown:
    """A text in a span of code, in which nothing else means anything."""
    return Markdown(f"`{_LINE_BREAKS.sub(' ', text).replace('`', chr(39))}`")


def linked(title: str, address: str | None) -> Markdown:
    """A title with a link, if the address is a page of the web's."""
    if not re.fullmatch(r"https?://[^\s<>()\"'`|\\]+", address or ""):
        return escaped(title)
    return Markdown(f"[{escaped(title)}]({address})")


def fenced(language: str, text: str) -> Markdown:
    """A block of code, within a fence that is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def table(rows: list[dict]) -> Markdown:
    """Rows with the same keys -> a Markdown table, accuracies with three digits; None is empty; no rows, no table."""

    def cell(value) -> str:
        if value is None:
            return ""
        text = escaped(f"{value:.3f}" if isinstance(value, float) else value).strip()
        return re.sub(r"(?<!\\)\|", r"\\|", text)

    if not rows:
        return Markdown()
    lines = [map(cell, rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return Markdown("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


def rendered(template: str, strict: bool = False, **fields) -> str:
    """A template of Jinja's with its fields, and the filters `table`, `code` and `markdown` (which escapes nothing).

    Args:
        template: Its text.
        strict: Whether every field must be there, and lines of statements leave nothing behind.
        **fields: What it names.
    """
    environment = Environment(
        undefined=StrictUndefined if strict else Undefined, finalize=escaped, trim_blocks=strict,
        lstrip_blocks=strict, keep_trailing_newline=strict,
    )  # fmt: skip
    environment.filters |= {"table": table, "code": code, "markdown": Markdown}
    return environment.from_string(template).render(fields)

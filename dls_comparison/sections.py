"""Reading a YAML file that a person wrote: every mistake ends in one line with the file and the key."""

import re
import reprlib
import shlex
from pathlib import Path

import yaml

from datasets_scripts.errors import UserError
from datasets_scripts.files import reason

# They become parts of file names, between dots.
NAME = re.compile(r"[\w+-]+", re.ASCII)
# What the keys of a plan say to the scripts; a plan's `options` leave them alone.
OWN_OPTIONS = {
    "--corpus", "--model_name_or_path", "--init", "--fold", "--exclude_fold", "--seed", "--output_dir",
    "--resume_from_checkpoint",
}  # fmt: skip
LARGEST = 2**31 - 1  # of a seed, or a fold
shortened = reprlib.repr  # of what may be a stranger's: a few references make a YAML value of any length
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "keys"}
REQUIRED = object()


class Section:
    """Keys of the file below one place. Each is taken once; what nobody took is a mistake.

    Every method raises a UserError that names the file and the key.
    """

    def __init__(self, content, file: Path, where: str):
        self.file, self.where = file, where
        if not isinstance(content, dict):
            self.fail(f"must have keys, not {shortened(content)}")
        self.content = {str(key): value for key, value in content.items()}

    def fail(self, problem: str, key: str = ""):
        place = ".".join(filter(None, (self.where, key)))
        raise UserError(f"{self.file}: {place + ': ' if place else ''}{problem}")

    def take(self, key: str, kind: type, default=REQUIRED):
        value = self.content.pop(key, None)
        if value is None:
            return self.fail("is missing", key) if default is REQUIRED else default
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            self.fail(f"must be {KINDS[kind]}, not {shortened(value)}", key)
        return value

    def section(self, key: str, content) -> "Section":
        return Section(content, self.file, ".".join(filter(None, (self.where, key))))

    def sections(self, key: str) -> dict[str, "Section"]:
        """{name: section} of a key that holds named things; nothing where there is no such key."""
        parent = self.section(key, self.take(key, dict, {}))
        for name in parent.content:
            parent.check_name(name)
        return {name: parent.section(name, content) for name, content in parent.content.items()}

    def check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            self.fail(f"{name!r} is no name: letters, digits, _, + and - make one")

    def check_known(self, name: str, known, key: str) -> None:
        if name not in known:
            self.fail(f"there is no {name!r}; choose from {', '.join(known)}", key)

    def choices(self, key: str, known) -> list[str]:
        """A list of names, each of which must be known."""
        names = [str(name) for name in self.take(key, list)]
        for name in names:
            self.check_known(name, known, key)
        if len(set(names)) < len(names) or not names:
            self.fail("must name one thing or several, each once", key)
        return names

    def numbers(self, key: str, default: list[int] | None = None, minimum: int = 0) -> list[int]:
        values = self.take(key, list, default)
        numbers = values and all(type(value) is int and minimum <= value <= LARGEST for value in values)
        if not numbers or len(set(values)) < len(values):
            self.fail(f"must be a list of different whole numbers from {minimum}, not {shortened(values)}", key)
        return values

    def options(self) -> list[str]:
        """The words of `options`, a text as one would type it."""
        try:
            words = shlex.split(self.take("options", str, ""))
        except ValueError as error:
            self.fail(f"{error}", "options")
        for word in words:
            if word.partition("=")[0] in OWN_OPTIONS:
                self.fail(f"{word} is what keys of this file are for", "options")
        return words

    def close(self) -> None:
        for key in self.content:
            self.fail("is unknown", key)


class UniqueKeys(yaml.SafeLoader):
    """YAML itself lets a later key replace an earlier one of the same name without a word."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Section:
    """The file's content.

    Raises:
        UserError: naming the file and, where there is one, the line.
    """
    try:
        return Section(yaml.load(file.read_text(encoding="utf-8"), UniqueKeys), file, "")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # such as a date that there is not
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}") from error

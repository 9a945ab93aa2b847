"""A command's options as a dataclass: one table of fields makes the command line, and checks what Python code gives.

    @dataclass(kw_only=True)
    class Settings(Options):
        steps: int = option(100, whole(1), "how many")

`Settings(steps=3)` and `Settings.parsed(["--steps", "3"])` are the same, and so are their mistakes: one `UserError`,
which the command line prints as argparse does. Imports nothing heavy.
"""

import argparse
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from .command_line import Parser
from .errors import UserError

LARGEST = 2**31 - 1  # of whole numbers, where nothing else bounds them
_UNSET: Any = object()  # tells what was given from what was not


def option(
    default: Any, read: Callable, help: str, *, many: bool = False, bare: Any = None, metavar: str = "",
    positional: bool = False, required: bool = False,
) -> Any:  # fmt: skip
    """A field that is an option of the command line.

    Args:
        default: Where neither the user nor a recipe gives it; None: it may be absent.
        read: Text, or what Python code gives, -> the value; a ValueError says what is wrong with it.
        help: For people. The default is added where it does not speak of one.
        many: Whether it can be given several times, and is a list.
        bare: Its value where it is given without one.
        metavar: Of its value in the help.
        positional: Whether it is known by its place.
        required: Whether it must be given.
    """
    about = {"default": default, "read": read, "help": help, "many": many, "bare": bare, "metavar": metavar}
    about |= {"positional": positional, "required": required}
    return field(default=_UNSET, metadata=about)


def argument(read: Callable) -> Callable[[str], Any]:
    """`read` as argparse's `type`, for a command whose parser is written out."""

    def parse(value: str):
        try:
            return read(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def whole(low: int, high: int = LARGEST) -> Callable[[Any], int]:
    """Reads whole numbers in low..high."""
    return lambda value: _within(_number(value, int, "a whole number"), low, high)


def whole_numbers(low: int, high: int = LARGEST) -> Callable[[Any], list[int]]:
    """Reads whole numbers in low..high with commas between, or a list of them."""
    return lambda value: [
        whole(low, high)(number) for number in (value.split(",") if isinstance(value, str) else value)
    ]


def real(low: float, high: float = math.inf, below: float = math.inf) -> Callable[[Any], float]:
    """Reads finite numbers in low..high, and below `below`."""

    def read(value) -> float:
        number = _within(_number(value, float, "a finite number"), low, high)
        if number >= below:
            raise ValueError(f"must be at least {low} and below {below}, not {value}")
        return number

    return read


def _number(value, kind: type, what: str):
    try:
        number = None if isinstance(value, bool) else kind(value)
        if number is None or not math.isfinite(number) or (not isinstance(value, str) and number != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be {what}, not {value!r}") from None
    return number


def _within(number, low, high):
    if low <= number <= high:
        return number
    if high in (math.inf, LARGEST):
        bounds = f"at least {low}" if number < low else f"at most {high}"
    else:
        bounds = f"between {low} and {high}"
    raise ValueError(f"must be {bounds}, not {number}")


def text(value) -> str:
    """Reads a text that is not empty."""
    if not str(value).strip():
        raise ValueError("must not be empty")
    return str(value)


def label_pattern(value) -> str:
    """Reads a regular expression that finds a class, and perhaps a recording, in a file's name."""
    try:
        groups = re.compile(text(value)).groupindex
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression ({error})") from error
    if not groups or groups.keys() - {"label", "source"}:
        raise ValueError(f"{value!r} must have the group (?P<label>…), and may have (?P<source>…), and no other name")
    return str(value)


def path(value) -> Path:
    """Reads a file's or folder's name; `~` stands for the user's own folder, also behind a `=`."""
    try:
        return Path(text(value)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{value}: {error}") from error


def path_or_id(value) -> str:
    """Reads a file's or folder's name, or what stands for something else, such as a Hub id."""
    return str(path(value)) if text(value).startswith("~") else str(value)


def flag(value) -> bool:
    """Reads what is on or off."""
    if not isinstance(value, bool):
        raise ValueError(f"must be True or False, not {value!r}")
    return value


class one_of:
    """Reads one of some words."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def __call__(self, value) -> str:
        if value not in self.choices:
            raise ValueError(f"invalid choice: {value!r} (choose from {', '.join(self.choices)})")
        return value


def named_source(value) -> tuple[str, str | None]:
    """Reads NAME or NAME=DIR, or such a pair."""
    name, _, source = value.partition("=") if isinstance(value, str) else (value[0], "", value[1])
    if source is None or (isinstance(value, str) and "=" not in value):
        return text(name), None
    return text(name), path_or_id(source)


@dataclass(kw_only=True)
class Options:
    """What commands' settings have in common; `recipe` sets the defaults of others, see `RECIPES`.

    Attributes:
        RECIPES: {recipe: {option: its default}}; the first holds wherever no other is chosen or says otherwise.
        SCRIPT: The command's own name.
    """

    RECIPES: ClassVar[dict[str, dict]] = {"": {}}
    SCRIPT: ClassVar[str]

    def __post_init__(self) -> None:
        self.command = shlex.join([self.SCRIPT, *self.words()])
        self.fill_in()
        self.check()

    def fill_in(self) -> None:
        """Takes defaults for what was not given, and reads everything.

        Raises:
            UserError: naming the option.
        """
        for own in _options(type(self)):
            value = getattr(self, own.name)
            if value is _UNSET:
                value = self.default(own)
            absent = value is None and own.metadata["default"] is None
            if absent and own.metadata["required"]:
                raise UserError(f"argument {_shown(own)}: must be given")
            setattr(self, own.name, None if absent else _read(own, value))

    def default(self, own: Field):
        """Of an option that was not given."""
        recipe = self.RECIPES.get(getattr(self, "recipe", ""), {})  # of which the first is not known yet
        for values in (recipe, next(iter(self.RECIPES.values()))):
            if own.name in values:
                return values[own.name]
        return list(own.metadata["default"]) if own.metadata["many"] else own.metadata["default"]

    def check(self) -> None:
        """Of options that must go together.

        Raises:
            UserError: naming them.
        """

    def words(self) -> list[str]:
        """What was given, as it would be typed."""
        given = ((own, getattr(self, own.name)) for own in _options(type(self)))
        return [word for own, value in given if value is not _UNSET for word in _words(own, value)]

    def plain(self) -> dict:
        """{option: value}, as JSON takes it."""
        values = {own.name: getattr(self, own.name) for own in _options(type(self))}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def parsed(cls, argv: list[str] | None = None):
        """From a command line; ends the process where that is wrong, as argparse does.

        Args:
            argv: None: the process's own.
        """
        parser = cls.parser()
        words = sys.argv[1:] if argv is None else argv
        try:
            settings = cls(**vars(parser.parse_intermixed_args(words)))
        except UserError as error:
            parser.error(str(error))
        settings.command = shlex.join([cls.SCRIPT, *map(str, words)])
        return settings

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        """Of all options, in groups named after the classes that declare them."""
        parser = Parser(
            prog=cls.SCRIPT,
            description=_first_line(cls),
            epilog=cls.epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        for declaring in reversed(cls.__mro__):
            names = getattr(declaring, "__annotations__", {})
            if own := [option for option in _options(cls) if option.name in names]:
                title = cls.SCRIPT if declaring is cls else _first_line(declaring).rstrip(".")
                group = parser.add_argument_group(title)
                for each in own:
                    _add(group, each, cls)
        return parser

    @classmethod
    def epilog(cls) -> str:
        """What stands below the options: recipes as they would be typed, a few options to a line."""
        shown = []
        for name, values in list(cls.RECIPES.items())[1:]:
            typed = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items())
            lines = textwrap.wrap(typed, 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
            shown += [f"--recipe {name} stands for", *lines]
        return "\n".join(shown)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or cls.__name__).splitlines()[0]


def _options(cls: type) -> list[Field]:
    return [each for each in fields(cls) if "read" in each.metadata]


def _read(own: Field, value):
    """Raises UserError, naming the option."""
    read = own.metadata["read"]
    try:
        return [read(each) for each in value] if own.metadata["many"] else read(value)
    except ValueError as error:
        raise UserError(f"argument {_shown(own)}: {error}") from error


def _shown(own: Field) -> str:
    """The option's name, as the help has it."""
    return own.metadata["metavar"] or own.name.upper() if own.metadata["positional"] else f"--{own.name}"


def _words(own: Field, value) -> list[str]:
    if own.metadata["positional"]:
        return [str(each) for each in (value if own.metadata["many"] else [value])]
    if own.metadata["many"]:
        return [word for each in value for word in _words_of_one(own.name, each)]
    return _words_of_one(own.name, value)


def _words_of_one(name: str, value) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        value = ",".join(map(str, value))
    parts = value if isinstance(value, tuple) else (value,)
    return [] if value is None else [f"--{name}", "=".join(str(part) for part in parts if part is not None)]


def _add(group, own: Field, cls: type[Options]) -> None:
    """Texts are taken as they are: the settings read them."""
    about = own.metadata
    default = next(iter(cls.RECIPES.values())).get(own.name, about["default"])
    help = about["help"].replace("%", "%%")
    if about["read"] is flag:
        negatable = any(own.name in values for values in cls.RECIPES.values())
        action = argparse.BooleanOptionalAction if negatable else "store_true"
        group.add_argument(f"--{own.name}", action=action, help=help)
        return
    if "default" not in help and not about["many"] and default is not None:
        help += f" (default: {default})"
    if about["positional"]:
        group.add_argument(own.name, nargs="*" if about["many"] else "?", metavar=_shown(own), help=help)
        return
    choices = getattr(about["read"], "choices", None)
    metavar = about["metavar"] or (f"{{{','.join(choices)}}}" if choices else None)
    extra = {"action": "append"} if about["many"] else {}
    if about["bare"] is not None:
        extra |= {"nargs": "?", "const": about["bare"]}
    group.add_argument(f"--{own.name}", metavar=metavar, help=help, **extra)

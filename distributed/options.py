"""Reads the options of a command; a message about unknown ones names what was probably meant."""

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tyro

T = TypeVar("T")

MOST = 3
"""Options that a message suggests at most."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Within it, a ValueError prints one message and exits with code 2."""
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def read_options(
    default: T, arguments: Sequence[str], *, prog: str, description: str, more: Sequence[str] = ()
) -> T:
    """Read `--section.field value ...` into a copy of `default`, a dataclass.

    Args:
        default: has the value of each field that is not given.
        arguments: of the command line.
        prog: the command, for its help.
        description: the first lines of its help.
        more: options that the command itself has taken off the arguments, without dashes.

    Raises:
        ValueError: an unknown option, or a value that the configuration refuses.
    """
    config, unknown = tyro.cli(
        type(default),
        default=default,
        args=arguments,
        prog=prog,
        description=description,
        return_unknown_args=True,
    )
    if unknown:
        names = [name.removeprefix("train.") for name in option_names(config)]
        raise ValueError(unknown_options(unknown, [*more, *names], prog))
    return config


def option_names(config: Any, prefix: str = "") -> Iterator[str]:
    """The options of a configuration, a dataclass: `recipe.micro-batch` for each field, and
    `data.repeats.derain` for each entry of a mapping."""
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name.replace('_', '-')}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from option_names(value, f"{name}.")
        elif isinstance(value, Mapping) and value:
            yield from (f"{name}.{key.replace('_', '-')}" for key in value)
        else:
            yield name


def similar(option: str, names: Iterable[str]) -> list[str]:
    """The names that are most similar to `option`, the best first.

    Only the last parts are compared. They are similar if they are spelt almost the same, share a
    word, or one is the initials of the other: `learning-rate` finds `recipe.lr`.
    """
    leaf = option.replace("_", "-").lower().rpartition(".")[2]
    words = leaf.split("-")
    initials = "".join(word[:1] for word in words) if len(words) > 1 else ""

    def likeness(name: str) -> float:
        own = name.rpartition(".")[2]
        spelling = difflib.SequenceMatcher(None, leaf, own).ratio()
        shared = len(set(words) & set(own.split("-"))) / len(words)
        return max(spelling if spelling > 0.75 else 0.0, shared, float(own == initials))

    found = [(likeness(name), name) for name in names]
    best = max((score for score, _ in found), default=0.0)
    return [name for score, name in found if score == best and best >= 0.5][:MOST]


def unknown_options(arguments: Sequence[str], names: Iterable[str], prog: str) -> str:
    """One message about the arguments that a command does not know.

    Args:
        arguments: the unknown ones, with their values.
        names: all options of the command, without dashes.
        prog: the command, for the hint to its help.
    """
    names = list(names)
    options = [a.partition("=")[0] for a in arguments if re.match("--?[A-Za-z]", a)]
    messages = []
    for option in options:
        written = option.lstrip("-")
        entries = [name for name in names if name.startswith(f"{written}.")]
        near = entries[:MOST] or similar(written, names)
        hint = f"; did you mean {' or '.join(f'--{name}' for name in near)}?" if near else "."
        messages.append(f"unknown option {option}{hint}")
    if not options:
        messages = [f"unknown argument {arguments[0]!r}."]
    return f"{' '.join(messages)} {prog} --help lists all options"

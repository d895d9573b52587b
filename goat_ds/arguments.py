"""From the words of a command line to a dataclass of settings: every field is a flag of the same name.

Every program reads its flags here, so that all of them refuse an unknown flag, a bad value and a wrong choice alike.
"""

import dataclasses
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from enum import EnumType
from typing import Any, Generic, NamedTuple, TypeVar, get_args

from transformers import HfArgumentParser

from goat_ds.errors import ConfigError, raise_if_any

S = TypeVar("S")


def flag(default: Any, text: str) -> Any:
    """Return a field of settings: a flag with its default and its sentence in ``--help``."""
    return dataclasses.field(default=default, metadata={"help": text})


def required_flag(text: str) -> Any:
    """Return a field of settings: a flag that must be given."""
    return dataclasses.field(metadata={"help": text})


def list_flag(text: str, *, repeatable: bool = True, metavar: str | None = None) -> Any:
    """Return a field of settings: a flag with several values, None if it is not given.

    Args:
        text: Its sentence in ``--help``.
        repeatable: Whether a repeated flag adds up; else the last one counts.
        metavar: What a value is called in ``--help``.
    """
    more = {"action": "extend"} if repeatable else {}
    return dataclasses.field(default=None, metadata={"help": text, "metavar": metavar} | more)


class Parsed(NamedTuple, Generic[S]):
    """Settings, and the words of the command line that are none of theirs."""

    settings: S
    rest: list[str]


def parse_known(
    kind: type[S], arguments: Sequence[str], *, program: str, description: str, epilog: str | None = None
) -> Parsed[S]:
    """Return the settings that a command line holds, and the words that belong to no flag of theirs.

    Args:
        kind: Dataclass of the settings.
        arguments: The command line.
        program: Name of the program in ``--help``.
        description: What the program does.
        epilog: Last lines of ``--help``.

    Raises:
        ConfigError: a value that its flag does not take, or a flag that is missing.
    """
    # transformers types its dataclasses in a way that mypy cannot match.
    dataclass: Any = kind
    parser = _Parser(
        dataclass,
        prog=program,
        description=description,
        epilog=epilog,
        formatter_class=_Help,
        # An abbreviation would change its meaning, in silence, with the next flag that is added.
        allow_abbrev=False,
    )
    namespace, rest = parser.parse_known_args(list(arguments))
    return Parsed(kind(**{f.name: _typed(f, getattr(namespace, f.name)) for f in dataclasses.fields(dataclass)}), rest)


def parse(kind: type[S], arguments: Sequence[str], *, program: str, description: str, epilog: str | None = None) -> S:
    """Return the settings that a command line holds; arguments as of ``parse_known``.

    Raises:
        ConfigError: as ``parse_known``, or a word that belongs to no flag.
    """
    settings, rest = parse_known(kind, arguments, program=program, description=description, epilog=epilog)
    raise_if_any(mistakes(rest))
    return settings


def mistakes(rest: Sequence[str]) -> list[str]:
    """Return what is wrong with words that belong to no flag, one line each."""
    # A word that follows an unknown flag is its value.
    unknown = [f"{word} is not a setting; see --help" for word in rest if word.startswith("--")]
    return unknown or [f"{word} belongs to no flag; see --help" for word in rest]


class _Help(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: Action) -> str | None:
        """Leave out a default of None, which the sentence explains."""
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def _typed(setting: dataclasses.Field[Any], value: Any) -> Any:
    """Return the text of a choice as its enum member; argparse leaves it as text, even the default."""
    kinds = [kind for kind in (get_args(setting.type) or (setting.type,)) if isinstance(kind, EnumType)]
    return kinds[0](value) if kinds and value is not None else value

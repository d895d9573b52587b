"""Every error that goat_ds raises on purpose, one family.

GoatError
├── ConfigError     what the user gave is wrong: every problem at once, before anything expensive
│   └── LeftoverError   a base has the files of an adapter beside it
├── MergeError      a routed mixture was asked to become one dense weight in place
├── TrainingError   the run stopped itself: a non-finite loss, a rank that failed
│   ├── SaveError       a checkpoint could not be written; the earlier ones are whole
│   └── Interrupted     a signal asked the run to end; it has saved
└── ExportError     a checkpoint cannot leave as asked
"""

from collections.abc import Iterable


class GoatError(Exception):
    """Whatever goat_ds raises on purpose."""


class ConfigError(GoatError, ValueError):
    """What the user gave is wrong; each problem is one line: the field, its value, the way out.

    Attributes:
        problems: The lines.
        raised_everywhere: Whether every rank of the run raises this same error.
    """

    raised_everywhere = False

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, ...]]:
        """Keep the problems apart when the error crosses a process boundary."""
        return type(self), self.problems


class LeftoverError(ConfigError):
    """A base's folder also holds the files of an adapter, which transformers would load with it."""


class MergeError(GoatError, NotImplementedError):
    """A routed mixture depends on the token, so no dense weight equals it."""


class TrainingError(GoatError, RuntimeError):
    """The run stopped itself."""


class SaveError(TrainingError):
    """A checkpoint could not be written; the earlier ones are whole."""


class Interrupted(TrainingError):
    """A signal asked the run to end; it has saved, and can be started again."""


class ExportError(GoatError, RuntimeError):
    """A checkpoint cannot leave as asked."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name: what one line of a message has room for."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def raised_everywhere(*problems: str) -> ConfigError:
    """Return an error that every rank of the run raises alike, so that one of them says it."""
    error = ConfigError(*problems)
    error.raised_everywhere = True
    return error


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one ``ConfigError`` that holds every problem, or return.

    Raises:
        ConfigError: ``problems`` is not empty.
    """
    found = tuple(problems)
    if found:
        raise ConfigError(*found)

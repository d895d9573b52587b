"""What is compared, and how: ``compare.yaml``, read key by key. All that is wrong with it is reported at once."""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from goat_ds.errors import ConfigError, first_line, raise_if_any
from goat_ds.train.config import TrainConfig
from goat_ds.train.methods import Method

T = TypeVar("T")

OF_THE_COMPARISON = {
    "config": "the flags of all runs stand under train",
    "output_dir": "output_dir of the comparison holds the folders of all runs",
    "resume": "a run that was ended goes on by itself",
    "allow_changed": "a run with other settings is another run",
    "dry_run": "give --dry_run to the comparison",
    "local_rank": "a run is one process",
    "seed": "use screen.seeds and final.seeds",
    "learning_rate": "use learning_rates or rates of the method",
    "max_steps": "use screen.steps and final.steps",
    "num_epochs": "use screen.steps and final.steps",
}
"""Flags of a run that the comparison sets itself, and where to say what they would say."""
SAME_FOR_ALL = (
    *("model", "data", "eval_data", "split", "eval_split", "data_format", "max_length", "packing"),
    "eval_steps",
)
"""Flags that decide which tokens a run sees, and how it is judged: they stand under ``train`` only."""
FLAGS = frozenset(f.name for f in dataclasses.fields(TrainConfig))
WITHOUT_RANK = (Method.FULL, Method.FULL_MOE)
"""Methods that train weights, not low-rank products whose total rank is ``r``."""
MOST_RUNS_OF_A_GRID = 1000


class Budget(StrEnum):
    """What is equal between the methods, beside the tokens, the batches and the steps."""

    RANK = "rank"
    PARAMETERS = "parameters"
    NONE = "none"


class Point(NamedTuple):
    """What is searched over: a learning rate, and values of the flags of ``grid``."""

    rate: float
    grid: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        """Write the point as a user reads it."""
        return ", ".join([f"{self.rate:g}", *(f"{name} {value}" for name, value in self.grid)])


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One of the rivals."""

    name: str
    flags: dict[str, Any]
    """Of ``launch/train.py``, in place of those of all runs."""
    rates: tuple[float, ...]
    """Learning rates to begin with, rising."""
    grid: dict[str, tuple[Any, ...]]
    """More flags, with the values that are tried with every rate."""

    @property
    def grids(self) -> list[tuple[tuple[str, Any], ...]]:
        """Return every combination of values of ``grid``; one that is empty where there is no grid."""
        rows = itertools.product(*self.grid.values())
        return [tuple(zip(self.grid, row, strict=True)) for row in rows]

    @property
    def points(self) -> list[Point]:
        """Return what is tried before any edge is looked at."""
        return [Point(rate, grid) for grid in self.grids for rate in self.rates]


@dataclass(frozen=True, kw_only=True)
class Screen:
    """How rates are chosen: successive halving. Rung ``i`` trains ``steps * 2**i`` steps."""

    steps: int
    seeds: tuple[int, ...] = (0,)
    halvings: int = 1
    """Rungs after the first; each has half of the points and twice the steps of the one before."""
    keep: int = 1
    """Points of a method that go on to the final."""

    def steps_of(self, rung: int) -> int:
        """Return the steps of the runs of a rung, counted from 0."""
        return int(self.steps * 2**rung)


@dataclass(frozen=True, kw_only=True)
class Final:
    """What the methods are judged by: the same steps and seeds, hence the same batches, for all."""

    steps: int
    seeds: tuple[int, ...]
    eval_data: list[str] | None = None
    """Held-out data that no rate was chosen by; that of ``train`` by default."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of a comparison."""

    train: dict[str, Any]
    """Flags of all runs."""
    methods: tuple[Entrant, ...]
    reference: str
    """The method that the others are compared with; the first by default."""
    screen: Screen | None
    final: Final
    output_dir: Path
    budget: Budget = Budget.RANK
    parameter_tolerance: float = 0.05
    """Largest difference of trained parameters to the reference's, as a share of them (budget parameters)."""
    extend_edges: bool = True
    """Whether a rate beyond the grid is tried where the best one is at its edge."""
    max_extensions: int = 4
    """Most rates that a method gets beyond its grid."""
    workers: int | None = None
    """Runs side by side; by default one a GPU, or one on a CPU."""
    keep_checkpoints: bool = False
    """Whether the last checkpoint of every run stays on the disk."""

    def method(self, name: str) -> Entrant:
        """Return a method by its name."""
        return next(method for method in self.methods if method.name == name)

    def has_rank(self, name: str) -> bool:
        """Whether the flag ``r`` is the total rank of a method."""
        flags = self.train | self.method(name).flags
        return flags.get("method") not in WITHOUT_RANK and flags.get("peft_config") is None


def read_settings(path: Path) -> CompareSettings:
    """Read a comparison.

    Raises:
        ConfigError: it cannot be read, or with everything that is wrong with it by itself.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config ({path}) cannot be read: {first_line(error)}") from error
    problems: list[str] = []
    settings = _settings(Section(str(path), content, problems, prefix=""))
    raise_if_any(problems or _contradictions(settings))
    return settings


class Section:
    """A mapping of the file; what is wrong with it, and keys that nobody has taken, become problems."""

    def __init__(self, name: str, content: Any, problems: list[str], *, prefix: str | None = None) -> None:
        self.prefix = f"{name}." if prefix is None else prefix
        self.problems = problems
        if not isinstance(content, dict):
            problems.append(f"{name} must hold 'name: value' lines")
            content = {}
        self.left: dict[str, Any] = {str(key): value for key, value in content.items()}
        self._known: list[str] = []

    def take(self, key: str, read: Callable[[Any], T], default: T, *, required: bool = False) -> T:
        """Return a value, or the default where it is absent or, which becomes a problem, is not what it should be."""
        self._known.append(key)
        value = self.left.pop(key, None)
        if value is None:
            if required:
                self.problems.append(f"{self.prefix}{key} is required")
            return default
        try:
            return read(value)
        except ValueError as error:
            self.problems.append(f"{self.prefix}{key} ({value}) must be {error}")
            return default

    def section(self, key: str) -> "Section":
        """Return a mapping inside this one; empty where it is absent."""
        self._known.append(key)
        found = self.left.pop(key, None)
        return Section(f"{self.prefix}{key}", {} if found is None else found, self.problems)

    def close(self) -> None:
        """Report the keys that are left."""
        for key in self.left:
            near = difflib.get_close_matches(key, self._known, n=1)
            known = f"did you mean {near[0]}?" if near else f"it knows {', '.join(self._known)}"
            self.problems.append(f"{self.prefix}{key} is not a setting of a comparison; {known}")


def _settings(top: Section) -> CompareSettings:
    train = _train_flags(top)
    rates = _rates(top)
    is_screened = top.left.get("screen") is not None
    screen = top.section("screen")
    methods = tuple(_methods(top, rates))
    names = [method.name for method in methods]
    final = _final(top.section("final"), train.pop("max_steps", None))
    settings = CompareSettings(
        train=train,
        methods=methods,
        reference=top.take("reference", _one_of(names), names[0] if names else ""),
        screen=_screen(screen) if is_screened else None,
        final=final,
        output_dir=Path(top.take("output_dir", _text, "", required=True)),
        budget=Budget(top.take("budget", _one_of(list(Budget)), Budget.RANK)),
        parameter_tolerance=top.take("parameter_tolerance", _number(lambda x: 0 <= x < 1, "in [0, 1)"), 0.05),
        extend_edges=top.take("extend_edges", _switch, True),
        max_extensions=top.take("max_extensions", _whole(at_least=1), 4),
        workers=top.take("workers", _whole(at_least=1), None),
        keep_checkpoints=top.take("keep_checkpoints", _switch, False),
    )
    top.close()
    return settings


def _train_flags(top: Section) -> dict[str, Any]:
    flags: dict[str, Any] = top.take("train", _mapping, {})
    # The length of the final may stand where that of a run stands.
    own = {name: why for name, why in OF_THE_COMPARISON.items() if name != "max_steps"}
    for name in flags:
        top.problems.extend(_flag_problems(f"train.{name}", name, own))
    return dict(flags)


def _flag_problems(where: str, name: str, refused: Mapping[str, str]) -> Iterator[str]:
    if name in refused:
        yield f"{where} is set by the comparison: {refused[name]}"
    elif name not in FLAGS:
        yield f"{where} is not a setting of launch/train.py; its --help lists them"


def _methods(top: Section, rates: tuple[float, ...]) -> Iterator[Entrant]:
    listed = top.section("methods")
    if not listed.left:
        top.problems.append("methods is required: a name and its flags of launch/train.py for each, at least two")
    elif len(listed.left) == 1:
        top.problems.append(f"methods ({next(iter(listed.left))}) must be at least two")
    refused = OF_THE_COMPARISON | dict.fromkeys(SAME_FOR_ALL, "it must be the same for all methods; put it under train")
    for name, content in listed.left.items():
        if not re.fullmatch(r"\w[\w.+-]*", name):
            top.problems.append(f"methods.{name} must be named by letters, digits and . + - _")
        section = Section(f"methods.{name}", {} if content is None else content, top.problems)
        own_rates = _rates(section) or rates
        grid: dict[str, tuple[Any, ...]] = section.take("grid", _lists, {})
        if not own_rates:
            top.problems.append(f"methods.{name} has no rates; give it, or all, learning_rates or rates")
        for flag in [*section.left, *grid]:
            top.problems.extend(_flag_problems(f"methods.{name}.{flag}", flag, refused))
        for flag in section.left.keys() & grid.keys():
            top.problems.append(f"methods.{name}.{flag} stands in grid as well; leave one out")
        yield Entrant(name=name, flags=section.left, rates=own_rates, grid=grid)


def _rates(section: Section) -> tuple[float, ...]:
    """Return the learning rates of a section, rising; none where it has none."""
    listed: tuple[float, ...] = section.take("learning_rates", _rate_list, ())
    if section.left.get("rates") is None:
        return listed
    if listed:
        section.problems.append(f"{section.prefix}learning_rates and {section.prefix}rates are both given; choose one")
    span = section.section("rates")
    positive = _number(lambda x: x > 0, "above 0")
    low, high = (span.take(key, positive, 1.0, required=True) for key in ("from", "to"))
    factor = span.take("factor", _number(lambda x: x > 1, "above 1"), 2.0)
    span.close()
    if low > high:
        section.problems.append(f"{span.prefix}from ({low:g}) must be at most {span.prefix}to ({high:g})")
    count = math.floor(math.log(high / low) / math.log(factor) + 1e-9) + 1 if low <= high else 1
    if count > MOST_RUNS_OF_A_GRID:
        section.problems.append(f"{span.prefix}factor ({factor:g}) makes {count} rates; use a larger one")
    return tuple(rounded(low * factor**place) for place in range(min(count, MOST_RUNS_OF_A_GRID)))


def rounded(rate: float) -> float:
    """Return a rate with the digits that a person would write."""
    return float(f"{rate:.4g}")


def _screen(section: Section) -> Screen:
    screen = Screen(
        steps=section.take("steps", _whole(at_least=1), 1, required=True),
        seeds=section.take("seeds", _seeds, (0,)),
        halvings=section.take("halvings", _whole(at_least=0), 1),
        keep=section.take("keep", _whole(at_least=1), 1),
    )
    section.close()
    return screen


def _final(section: Section, max_steps: Any) -> Final:
    if max_steps is not None and "steps" in section.left:
        section.problems.append(f"train.max_steps ({max_steps}) and final.steps are both given; leave one out")
    section.left.setdefault("steps", max_steps)
    final = Final(
        steps=section.take("steps", _whole(at_least=1), 1, required=True),
        seeds=section.take("seeds", _seeds, (0, 1, 2)),
        eval_data=section.take("eval_data", _texts, None),
    )
    section.close()
    return final


def _contradictions(settings: CompareSettings) -> Iterator[str]:
    """Yield which settings do not go with one another."""
    if settings.screen is None:
        for method in settings.methods:
            if (count := len(method.points)) > 1 and len(settings.final.seeds) == 1:
                yield (
                    f"methods.{method.name} has {count} points and one seed to choose among them; give screen, or "
                    "more final.seeds"
                )
    if settings.budget is not Budget.NONE:
        for method in settings.methods:
            if "r" in method.grid:
                yield f"methods.{method.name}.grid.r contradicts budget {settings.budget}; use budget none"
            if settings.budget is Budget.PARAMETERS and method.flags.get("r") and method.name != settings.reference:
                yield (
                    f"methods.{method.name}.r ({method.flags['r']}) is what budget parameters chooses; leave it out, "
                    "or use another budget"
                )
    if settings.budget is Budget.PARAMETERS and settings.method(settings.reference).grid:
        yield f"methods.{settings.reference}.grid would change what budget parameters is measured by; use budget none"


# -- what a value must be


def _whole(*, at_least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise ValueError(f"a whole number of at least {at_least}")
        return value

    return read


def _as_float(value: Any) -> float:
    # YAML reads 1e-3, which has no dot, as a word.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("a number") from None


def _number(is_right: Callable[[float], bool], rule: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        number = _as_float(value)
        if not (math.isfinite(number) and is_right(number)):
            raise ValueError(rule)
        return number

    return read


def _rate_list(value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    rates = [_number(lambda x: x > 0, "one or more numbers above 0")(each) for each in values]
    if not rates or len(set(rates)) < len(rates):
        raise ValueError("one or more different numbers above 0")
    return tuple(sorted(rates))


def _seeds(value: Any) -> tuple[int, ...]:
    rule = "a list of different whole numbers of at least 0"
    if not isinstance(value, list) or not value:
        raise ValueError(rule)
    if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in value):
        raise ValueError(rule)
    if len(set(value)) < len(value):
        raise ValueError(rule)
    return tuple(value)


def _lists(value: Any) -> dict[str, tuple[Any, ...]]:
    rule = "flags, each with a list of different values"
    if not isinstance(value, dict) or not all(isinstance(values, list) and values for values in value.values()):
        raise ValueError(rule)
    if any(isinstance(each, list | dict) for values in value.values() for each in values):
        raise ValueError(rule)
    if any(len(set(map(str, values))) < len(values) for values in value.values()):
        raise ValueError(rule)
    return {str(name): tuple(values) for name, values in value.items()}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("'name: value' lines")
    return {str(name): each for name, each in value.items()}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [_text(each) for each in values]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a word")
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _one_of(names: list[Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"one of {', '.join(map(str, names))}")
        return value

    return read

"""Everything that can be wrong with any run of a comparison, in one message, before the first one starts.

The checks are those of ``launch/train.py``, on every combination of flags and every length of a run.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from goat_ds.compare import equal_size
from goat_ds.compare.compare_file import Budget, CompareSettings, Entrant
from goat_ds.compare.equal_size import LARGEST_R, Choice
from goat_ds.compare.trials import config_of, flags_of
from goat_ds.errors import ConfigError, raise_if_any
from goat_ds.plan.skeleton import Kind
from goat_ds.train import preflight
from goat_ds.train.config import TrainConfig
from goat_ds.train.inputs import read_inputs
from goat_ds.train.resume import look

Grid = tuple[tuple[str, Any], ...]


class Size(NamedTuple):
    """How large a method is for some values of its grid."""

    r: int | None
    """That was chosen to match the reference; None: the method's own."""
    num_trained: int


Sizes = dict[tuple[str, Grid], Size]


def prepare(settings: CompareSettings) -> Sizes:
    """Check every run that the comparison may start, and return the size of every method.

    Raises:
        ConfigError: with everything that is wrong with any of them.
    """
    found = Findings(tuple(method.name for method in settings.methods))
    configs: dict[tuple[str, Grid], TrainConfig] = {}
    for method in settings.methods:
        for grid in method.grids:
            with found.of(method.name):
                configs[method.name, grid] = _parsed(settings, method, grid)
    raise_if_any(found.lines())
    raise_if_any(_unequal_batches(settings, configs))
    if settings.budget is Budget.RANK:
        raise_if_any(_unequal_ranks(settings, configs))
    for (name, _), config in configs.items():
        with found.of(name):
            raise_if_any(_problems(settings, config))
    found.lines_of_all.extend(_problems_of_all(settings, next(iter(configs.values()))))
    raise_if_any(found.lines())
    return _sizes(settings, configs)


class Findings:
    """Problems by the methods that have them: what all of them have is said once."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._methods: dict[str, list[str]] = {}
        self.lines_of_all: list[str] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Keep what is raised in a block as problems of a method."""
        try:
            yield
        except ConfigError as error:
            for problem in error.problems:
                self._methods.setdefault(problem, []).append(name)

    def lines(self) -> Iterator[str]:
        """Yield every problem once."""
        for problem, names in self._methods.items():
            where = "train" if set(names) == set(self._names) else f"methods.{', '.join(dict.fromkeys(names))}"
            yield f"{where}: {problem}"
        yield from self.lines_of_all


def _parsed(settings: CompareSettings, method: Entrant, grid: Grid) -> TrainConfig:
    """Return the settings of a method's runs at their longest, in a folder that is not there."""
    longest = settings.final.steps
    own = {"output_dir": str(settings.output_dir / "runs" / "checked"), "max_steps": longest}
    # The lowest: no rate is refused because it is too high.
    own["learning_rate"] = method.rates[0]
    return config_of(flags_of(settings, method.name, grid, r=None) | own)


def _problems(settings: CompareSettings, config: TrainConfig) -> Iterator[str]:
    """Yield what is wrong with the runs of a method at each of their lengths, but with the data."""
    # Each run has a new folder; it is no business of these checks whether the comparison has been here before.
    config = dataclasses.replace(config, resume="auto")
    yield from preflight.problems(look(config), read_inputs(config))
    if settings.screen is not None:
        known = set(config.problems())
        for rung in range(settings.screen.halvings + 1):
            steps = settings.screen.steps_of(rung)
            shorter = dataclasses.replace(config, max_steps=steps)
            yield from (f"rung {rung} ({steps} steps): {line}" for line in shorter.problems() if line not in known)


def _problems_of_all(settings: CompareSettings, config: TrainConfig) -> Iterator[str]:
    """Yield what is wrong with the data, which all runs share."""
    yield from preflight.data_problems(config)
    if settings.final.eval_data:
        yield from preflight.data_problems(dataclasses.replace(config, eval_data=settings.final.eval_data))
    if not config.eval_sources:
        yield "train.eval_data is required: methods are compared by their held-out loss"


def _unequal_batches(settings: CompareSettings, configs: dict[tuple[str, Grid], TrainConfig]) -> Iterator[str]:
    first = settings.methods[0].name
    sizes = {name: config.packs_per_step(1) for (name, _), config in configs.items()}
    for name, size in sizes.items():
        if size != sizes[first]:
            yield f"methods.{name} has steps of {size} packs and {first} of {sizes[first]}; give both the same"


def _unequal_ranks(settings: CompareSettings, configs: dict[tuple[str, Grid], TrainConfig]) -> Iterator[str]:
    own = {name: config.r for (name, _), config in configs.items() if settings.has_rank(name)}
    for (name, _), config in configs.items():
        # What a file of PEFT's calls r is a rank too.
        if config.peft_config is not None and isinstance(r := getattr(read_inputs(config).adapter, "r", None), int):
            own[name] = r
    for name, r in own.items():
        wanted = own.get(settings.reference, next(iter(own.values())))
        if r != wanted:
            yield (
                f"methods.{name}.r ({r}) is not the {wanted} of {settings.reference}; give the same r to all, or use "
                "budget parameters or none"
            )


def num_trained(config: TrainConfig) -> int:
    """Count the parameters that a run trains; reads no weight.

    Raises:
        ConfigError: the adapter does not fit the base.
    """
    return preflight.planner_of(read_inputs(config)).skeleton.count(Kind.TRAINED)


def shared_config(settings: CompareSettings) -> TrainConfig:
    """Return the settings of a run of the first method: what they say of data and base holds for all."""
    method = settings.methods[0]
    return _parsed(settings, method, method.grids[0])


def num_base_values(config: TrainConfig) -> int:
    """Count the parameters of the base of a run; reads no weight."""
    return preflight.planner_of(read_inputs(config)).skeleton.num_base_values


def _sizes(settings: CompareSettings, configs: dict[tuple[str, Grid], TrainConfig]) -> Sizes:
    counts = {key: num_trained(config) for key, config in configs.items()}
    if settings.budget is not Budget.PARAMETERS:
        return {key: Size(None, count) for key, count in counts.items()}
    target = counts[settings.reference, ()]
    sizes: Sizes = {}
    problems: list[str] = []
    for (name, grid), config in configs.items():
        if name == settings.reference:
            sizes[name, grid] = Size(None, target)
            continue
        if not settings.has_rank(name):
            problems.append(f"methods.{name} has no r that budget parameters could choose; use budget none")
            continue
        choices = _choices(settings, settings.method(name), grid, config, target=target)
        line = equal_size.problem(
            name, settings.reference, choices, target=target, tolerance=settings.parameter_tolerance
        )
        if line:
            problems.append(line)
        else:
            sizes[name, grid] = Size(*choices[0])
    raise_if_any(problems)
    return sizes


def _choices(
    settings: CompareSettings, method: Entrant, grid: Grid, config: TrainConfig, *, target: int
) -> list[Choice]:
    replaced: Callable[[int], TrainConfig] = cache(lambda r: dataclasses.replace(config, r=r))
    accepted = [r for r in range(1, LARGEST_R + 1) if not any(replaced(r).problems())]
    return equal_size.nearest(lambda r: num_trained(replaced(r)), accepted, target=target)

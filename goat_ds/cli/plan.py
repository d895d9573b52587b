"""Print what a run needs before it is paid for: ``goat-ds plan --model PATH --ds_config FILE --world_size N``.

Nothing but the model's config.json is read. All flags of goat-ds train count as they would there (max_length,
micro_batch_size, gradient_checkpointing, load_in_4bit, r ...); data and output_dir are not needed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from goat_ds import plan
from goat_ds.arguments import flag, parse_known
from goat_ds.cli.program import logger, program
from goat_ds.errors import raise_if_any
from goat_ds.train.cli import parse
from goat_ds.train.inputs import read_inputs
from goat_ds.train.preflight import REQUIRED_TO_PLAN, plan_problems, planner_of


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Settings of a plan beside the flags of the run."""

    world_size: int = flag(1, "ranks of the run, one a GPU")


@program
def main(arguments: Sequence[str]) -> None:
    """Plan as the command line says, and show it."""
    flags, of_the_run = parse_known(
        PlanFlags,
        arguments,
        program="goat-ds plan",
        description=__doc__,
        epilog="every other flag is one of goat-ds train, whose --help lists them",
    )
    config = parse(of_the_run, required=REQUIRED_TO_PLAN)
    inputs = read_inputs(config, world_size=flags.world_size)
    raise_if_any(plan_problems(inputs))
    for line in plan.lines(planner_of(inputs)):
        logger.info(line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

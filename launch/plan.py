"""Say what a run needs before it is paid for: ``python launch/plan.py --model PATH --ds_config FILE --world_size N``.

Nothing but the model's config.json is read. All flags of launch/train.py count as they would there (max_length,
micro_batch_size, gradient_checkpointing, load_in_4bit, r ...); data and output_dir are not needed.
"""

import argparse
import sys
import warnings

from goat_ds import plan
from goat_ds.errors import ConfigError, raise_if_any
from goat_ds.train.cli import parse
from goat_ds.train.inputs import read_inputs
from goat_ds.train.preflight import REQUIRED_TO_PLAN, plan_problems, planner_of


def main(arguments: list[str]) -> None:
    """Plan as the command line says, and print it."""
    # A call that PEFT makes; nothing a user could act on.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--world_size", type=int, default=1, help="ranks of the run, one a GPU (%(default)s)")
    parser.epilog = "every other flag is one of launch/train.py, whose --help lists them"
    known, others = parser.parse_known_args(arguments)
    try:
        config = parse(others, required=REQUIRED_TO_PLAN)
        inputs = read_inputs(config, world_size=known.world_size)
        raise_if_any(plan_problems(inputs))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for line in plan.lines(planner_of(inputs)):
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

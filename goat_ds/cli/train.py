"""Train GOAT experts on a frozen base model: ``goat-ds train --ds_config zero3``.

Several ranks: ``deepspeed --num_gpus 8 --module goat_ds.cli.train --ds_config zero3``, or
``torchrun --nproc-per-node 8 -m -- goat_ds.cli.train --ds_config zero3``.
"""

import sys
from collections.abc import Sequence

from goat_ds.train import run


def main(arguments: Sequence[str]) -> None:
    """Train as the command line says; ends the process itself with an exit code that is not 0."""
    run.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What all programs share: what they say is shown, and what the user got wrong ends them with exit code 2."""

import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence

from goat_ds.distributed import messages, ranks
from goat_ds.errors import GoatError

# Of all programs: one that python -m starts is named __main__, which is no part of goat_ds.
logger = logging.getLogger(__name__)

Program = Callable[[Sequence[str]], int | None]


def program(run: Program) -> Program:
    """Return a program that shows what ``run`` says, and says what it refuses on stderr."""

    @functools.wraps(run)
    def main(arguments: Sequence[str]) -> int | None:
        with messages.shown(), warnings.catch_warnings():
            # A call that PEFT makes; nothing a user could act on.
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            try:
                return run(arguments)
            except GoatError as error:
                return _refuse(error)
            finally:
                # Not before: ranks that miss one of theirs fail, before that one has said why it ended.
                ranks.leave()

    return main


def _refuse(error: GoatError) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # What all ranks have found, the first one says, and the launcher then ends the others.
        time.sleep(2)
    print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
    return 2

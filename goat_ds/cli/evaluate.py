"""Judge a model on data and on tasks: ``goat-ds evaluate --model PATH --data FILE``.

PATH is a model folder or hub name (dense exports are such folders), an exact export, an adapter, a checkpoint, or the
output_dir of a run.
"""

import sys
from collections.abc import Sequence

from goat_ds.arguments import parse
from goat_ds.cli.program import logger, program
from goat_ds.evaluate import EvalSettings, evaluate


def settings_from(arguments: Sequence[str]) -> EvalSettings:
    """Read the command line.

    Raises:
        ConfigError: it holds words that it should not hold.
    """
    return parse(EvalSettings, arguments, program="goat-ds evaluate", description=__doc__)


@program
def main(arguments: Sequence[str]) -> int | None:
    """Evaluate as the command line says, and show the table."""
    settings = settings_from(arguments)
    report = evaluate(settings)
    # Before anything can go wrong with the file.
    logger.info(report)
    if settings.output is not None:
        try:
            report.write(settings.output)
        except OSError as error:
            print(f"error: output ({settings.output}) was not written: {error}", file=sys.stderr)
            return 1
        logger.info(f"wrote {settings.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

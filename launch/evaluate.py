"""Judge a model on data and on tasks: ``python launch/evaluate.py --model PATH --data FILE``.

PATH is a model folder or hub name (dense exports are such folders), an exact export, an adapter, a checkpoint, or the
output_dir of a run.
"""

import argparse
import sys
import warnings
from pathlib import Path

from goat_ds.data import DataFormat
from goat_ds.errors import GoatError
from goat_ds.evaluate import Dtype, EvalSettings, Metric, evaluate


def settings_from(arguments: list[str]) -> EvalSettings:
    """Read the command line."""
    defaults = EvalSettings(model="")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="a model folder or hub name, an adapter, a checkpoint, or the output_dir of a run",
    )
    add("--base", help="folder or hub name of an adapter's base, if it is not where the adapter says")
    add("--data", nargs="+", action="extend", default=[], help="files, folders or hub names; repeatable")
    add("--data_format", choices=list(map(str, DataFormat)), help="format of all data; recognised by default")
    add("--split", default=defaults.split, help="split of folders and hub data sets (test)")
    add(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help=f"of {', '.join(Metric)}; by default the first two, and the last where choices are given",
    )
    add(
        "--choices",
        nargs="+",
        default=[],
        help="answers to choose from (choice_accuracy); the different answers of the data by default",
    )
    add("--tasks", nargs="+", default=[], help="lm-evaluation-harness tasks: names, patterns or YAML files")
    add("--include_path", type=Path, help="folder with task files of your own")
    add("--apply_chat_template", action="store_true", help="put the prompts of tasks into the chat template")
    add(
        "--dtype",
        choices=list(map(str, Dtype)),
        default=str(Dtype.AUTO),
        help="dtype of weights; the files' own (auto)",
    )
    add("--batch_size", type=int, default=defaults.batch_size, help="sequences in one forward (%(default)s)")
    add("--max_length", type=int, default=defaults.max_length, help="tokens of a record, for perplexity (%(default)s)")
    add("--max_new_tokens", type=int, default=defaults.max_new_tokens, help="tokens of an answer (%(default)s)")
    add("--limit", type=int, help="only the first so many records, and documents of each task")
    add("--trust_remote_code", action="store_true", help="run the modelling code beside the weights (exact exports)")
    add("--output", type=Path, help="new JSON file for the report")
    given = vars(parser.parse_args(arguments))
    given |= {name: tuple(given[name]) for name in ("data", "choices", "tasks")}
    given["metrics"] = given["metrics"] and tuple(given["metrics"])
    given["data_format"] = given["data_format"] and DataFormat(given["data_format"])
    return EvalSettings(**given | {"dtype": Dtype(given["dtype"])})


def main() -> None:
    """Evaluate as the command line says, and print the table."""
    # Tasks import the package "evaluate", and Python looks beside the script first.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    # A call that PEFT makes; nothing a user could act on.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    settings = settings_from(sys.argv[1:])
    try:
        report = evaluate(settings)
    except GoatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # Before anything can go wrong with the file.
    print(report)
    if settings.output is not None:
        try:
            report.write(settings.output)
        except OSError as error:
            sys.exit(f"error: output ({settings.output}) was not written: {error}")
        print(f"wrote {settings.output}")


if __name__ == "__main__":
    main()

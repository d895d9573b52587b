"""The programs, ``goat-ds train`` and its like: a module each, with ``main(arguments)``; ``launch/`` calls them.

    program     what all of them share: what they say is shown, what the user got wrong ends them with exit code 2
    train, export, evaluate, plan, compare, demo

Where several ranks are wanted, a launcher starts the module: ``deepspeed --module goat_ds.cli.train …``.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

PROGRAMS = {
    "train": "train GOAT experts on a frozen base model",
    "export": "write a trained checkpoint in a form that others load",
    "evaluate": "judge a model on data and on tasks",
    "plan": "print what a run needs before it is paid for",
    "compare": "find out which method is best on your data",
    "demo": "train, export and question the embedded demo",
}


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the program that the first word names with the words after it; return its exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in PROGRAMS:
        error = f"error: {name} is not a program of goat-ds\n\n" if name else ""
        print(f"{error}{usage()}", file=sys.stderr)
        return 2
    # Only now: what trains takes seconds to import, and what exports must start without deepspeed.
    code: int | None = import_module(f"{__name__}.{name}").main(rest)
    return code


def usage() -> str:
    """Return the list of the programs."""
    lines = "\n".join(f"  {name:10}{text}" for name, text in PROGRAMS.items())
    return f"usage: goat-ds PROGRAM [FLAGS]\n\n{lines}\n\ngoat-ds PROGRAM --help lists its flags"

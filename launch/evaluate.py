"""Judge a model on data and on tasks: ``python launch/evaluate.py --model PATH --data FILE``."""

import sys
from pathlib import Path

from goat_ds.cli.evaluate import main

if __name__ == "__main__":
    # Tasks import the package "evaluate", and Python looks beside the script first.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    sys.exit(main(sys.argv[1:]))

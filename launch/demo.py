"""The whole way in one command: ``python launch/demo.py [--output DIR]``."""

import sys

from goat_ds.cli.demo import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

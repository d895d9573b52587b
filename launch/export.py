"""Write a trained checkpoint in a form that others load: ``python launch/export.py --checkpoint DIR --output DIR``."""

import sys

from goat_ds.cli.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

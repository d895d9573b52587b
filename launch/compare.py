"""Find out which method is best on your data: ``python launch/compare.py --config compare.yaml``."""

import sys

from goat_ds.cli.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

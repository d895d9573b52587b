"""Print what a run needs before it is paid for: ``python launch/plan.py --model PATH --ds_config FILE``."""

import sys

from goat_ds.cli.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

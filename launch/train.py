"""Train GOAT experts: ``deepspeed launch/train.py --ds_config ds_configs/zero3.json``; ``--help`` lists the flags."""

import sys

from goat_ds.cli.train import main

if __name__ == "__main__":
    main(sys.argv[1:])

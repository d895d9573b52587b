"""A run whose ranks are nodes of their own: ``python one_rank_a_node.py FLAGS-0 FLAGS-1``, each a JSON list."""

import json
import os
import sys

from goat_ds.train.run import main

if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"
    main(json.loads(sys.argv[1 + int(os.environ["RANK"])]))

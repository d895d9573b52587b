"""Stand in for SLURM's srun, as ``srun``, on one machine: start the tasks, pass signals on, end as srun would.

Its arguments go to ``$SLURM_RECORD``. With ``$FAKE_CODE`` it starts nothing and ends with that code.
"""

import os
import signal
import subprocess
import sys
import time
from itertools import dropwhile


def main() -> int:
    with open(os.environ["SLURM_RECORD"], "a") as record:
        print("srun", *sys.argv[1:], file=record)
    if "FAKE_CODE" in os.environ:
        return int(os.environ["FAKE_CODE"])
    command = list(dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
    tasks = [
        subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
        for task in range(int(os.environ["SLURM_NTASKS"]))
    ]
    signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
    while all(task.poll() in (None, 0) for task in tasks) and any(task.poll() is None for task in tasks):
        time.sleep(0.1)
    # As --kill-on-bad-exit does it: the others are ended as soon as one has failed.
    for task in tasks:
        task.terminate()
    codes = [task.wait(timeout=60) for task in tasks]
    # Of the tasks' codes srun ends with the highest.
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main())

"""Run a script as ``python SCRIPT …`` would, with GOAT among PEFT's methods.

    python benchmarks/peft_comparison/launcher.py [--stand_ins] SCRIPT …

``--stand_ins`` puts the embedded demo's data, and where there is no accelerator the CPU, in place of what PEFT's
comparison asks for (``stand_ins.py``).
"""

import runpy
import sys
from pathlib import Path

import goat_ds  # noqa: F401  (importing it registers the method)


def main(words: list[str]) -> None:
    """Run the script that the first word names, or the second after ``--stand_ins``."""
    with_stand_ins = words[:1] == ["--stand_ins"]
    script, *rest = words[with_stand_ins:]
    install = None
    if with_stand_ins:
        from stand_ins import install
    # As Python sets both, so that the script finds the modules beside it.
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).resolve().parent)
    if install is not None:
        install()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

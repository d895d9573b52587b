"""The embedded demo: a tiny pretrained LLaMA, and instruction data about the made-up world it has read of.

    base/         the base, a Hugging Face folder of less than 4 MiB
    data/         instructions in Alpaca format; no fact is asked for in both files
    run.yaml      settings of a run that learns them
    exam.py       questions a model about the held-out ones, with plain transformers

The base has read every fact and can complete a sentence that states it, but has never seen an instruction.
``tools/make_demo`` in the repository made both.
"""

from importlib.resources import as_file, files
from pathlib import Path


def base_path() -> Path:
    """Return the folder of the pretrained base; ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it."""
    return _shipped("base")


def train_data() -> Path:
    """Return the instructions to train on, JSON Lines with ``instruction``, ``input`` and ``output``."""
    return _shipped("data/train.jsonl")


def heldout_data() -> Path:
    """Return the instructions to judge by; they ask for facts that ``train_data`` never asks for."""
    return _shipped("data/heldout.jsonl")


def exam_path() -> Path:
    """Return the script that questions a model; it needs nothing of goat_ds."""
    return _shipped("exam.py")


def settings() -> Path:
    """Return the settings of a run on this data, a YAML file as ``--config`` takes it."""
    return _shipped("run.yaml")


def _shipped(name: str) -> Path:
    # The package is installed as plain files, so the path outlives the context.
    with as_file(files(__name__).joinpath(name)) as path:
        return path

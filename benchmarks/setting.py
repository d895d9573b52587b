"""What benchmarks are set in: the shapes of real models, and ranks of one thread each."""

import os
import subprocess
import sys
import warnings

GEMMA_3_270M = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
"""Of a decoder layer."""
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
"""Of a decoder layer."""


def start_ranks(script: str, *flags: object, world_size: int = 2, quietly: bool = False) -> None:
    """Run a script in so many new processes that find each other.

    Args:
        script: Path of the file.
        flags: Its command line.
        world_size: How many.
        quietly: Whether what they print is shown only where they fail.

    Raises:
        SystemExit: they fail.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, script, *map(str, flags)],
        env=environment,
        stdout=subprocess.PIPE if quietly else None,
        stderr=subprocess.STDOUT if quietly else None,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{script} failed on {world_size} ranks\n{(done.stdout or '')[-6000:]}")


def ignore_calls_of_libraries() -> None:
    """Leave out warnings of what DeepSpeed and PEFT call, once a step; nothing a user could act on."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)

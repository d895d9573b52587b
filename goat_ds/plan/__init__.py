"""What a run needs, before it is paid for: parameters, bytes of a rank, seconds of the start, and GPUs that suffice.

    skeleton   config.json ─> every parameter without its memory
    timeline   one micro-batch on tensors without memory ─> what is held at every instant
    gathering  what ZeRO-3 has gathered at every instant
    memory     bytes of a rank in training and in a checkpoint
    start      bytes while a base is loaded, seconds of the decompositions
    advice     what of a ds_config is slow, or needs memory for nothing
    planner    all of it for one run, and the smallest number of GPUs

No weights are read, and nothing but ``config.json`` is.
"""

from goat_ds.plan.planner import Planner, PlanSettings
from goat_ds.plan.summary import lines

__all__ = ["PlanSettings", "Planner", "lines"]

"""Write a trained checkpoint in a form that others load: ``python launch/export.py --checkpoint DIR --output DIR``.

Under torchrun the ranks share the calibration tokens of ``--mode dense`` and ``--mode lora``.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed

from goat_ds.data.sample import NUM_TOKENS
from goat_ds.errors import ConfigError, GoatError
from goat_ds.export import (
    Dense,
    Exported,
    Fit,
    Fitting,
    MergeBase,
    export_adapter,
    export_dense,
    export_exact,
    export_lora,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES_OF = {
    "merge_base": ("exact", "dense", "lora"),
    "max_shard_size": ("exact", "dense"),
    "dtype": ("dense", "lora"),
    "fit": ("dense", "lora"),
    "calibration": ("dense", "lora"),
    "split": ("dense", "lora"),
    "heldout_split": ("dense", "lora"),
    "calibration_tokens": ("dense", "lora"),
    "refine_steps": ("dense", "lora"),
    "heldout": ("dense", "lora"),
    "heldout_labels": ("dense", "lora"),
    "max_length": ("dense", "lora"),
    "max_kl": ("dense", "lora"),
}
"""Flags that have an effect in some modes only."""


def main() -> None:
    """Read the command line, export, and say what was read and written."""
    args = _parser().parse_args()
    try:
        _refuse_useless(args)
        _join()
        exported = _export(args)
    except GoatError as error:
        sys.exit(_refusal(error))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if exported.report is None:
        return
    print(f"read {exported.adapter.path}\nwrote {args.output}")
    if exported.report.merge_base:
        print(f"base weights: {exported.report.merge_base}, {exported.report.values}")
    if isinstance(exported, Dense):
        print("\n".join(exported.report.table()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="an adapter, a checkpoint, or the output_dir of a run")
    parser.add_argument(
        "--mode",
        choices=["adapter", "exact", "dense", "lora"],
        required=True,
        help="a PEFT folder that needs goat_ds; the whole routed model, which brings its own code; the nearest dense "
        "model, which needs nothing; the same as a plain LoRA adapter",
    )
    parser.add_argument("--output", required=True, help="a new folder")
    parser.add_argument("--base", help="folder or hub name of the base, if it is not where the adapter says")
    parser.add_argument(
        "--merge_base",
        choices=[str(choice) for choice in MergeBase],
        help="which weights of the base: what its 4-bit weights stand for, or its unquantised ones; those that the "
        "adapter was trained on, if not given",
    )
    parser.add_argument("--max_shard_size", help="bytes of one weights file (exact, dense); 5GB by default")
    dense = parser.add_argument_group("dense and lora")
    defaults = Fitting()
    dense.add_argument("--fit", choices=[str(choice) for choice in Fit], help=f"{defaults.chosen_fit} by default")
    dense.add_argument("--calibration", nargs="+", action="extend", help="data to fit on; the checkpoint's own sample")
    dense.add_argument("--split", help="split of hub data sets and folders to fit on; train by default")
    dense.add_argument("--calibration_tokens", type=int, help=f"{NUM_TOKENS:,} by default")
    dense.add_argument("--refine_steps", type=int, help=f"of distilling end to end; {defaults.refine_steps} by default")
    dense.add_argument("--heldout", nargs="+", action="extend", help="data to compare on; the checkpoint's own sample")
    dense.add_argument("--heldout_split", help="split of hub data sets and folders to compare on; test by default")
    dense.add_argument(
        "--heldout_labels", type=int, help=f"label tokens to compare on; {defaults.heldout_labels:,} by default"
    )
    dense.add_argument("--max_length", type=int, help="tokens of the longest record that is named; as in the run")
    dense.add_argument("--max_kl", type=float, help="mean divergence in nats above which nothing is written")
    dense.add_argument("--dtype", choices=list(DTYPES), help="of the weights written, and compared in")
    return parser


def _refuse_useless(args: argparse.Namespace) -> None:
    """Check that every flag given has an effect.

    Raises:
        ConfigError: with each that has none.
    """
    useless = [
        f"{name} ({_shown(getattr(args, name))}) has no effect with --mode {args.mode}; leave it out, or use --mode "
        f"{' or '.join(modes)}"
        for name, modes in MODES_OF.items()
        if getattr(args, name) is not None and args.mode not in modes
    ]
    if useless:
        raise ConfigError(*useless)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _join() -> None:
    """Join the other ranks, where torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise ConfigError(
            f"WORLD_SIZE says that there are several processes, and {', '.join(absent)} is not set; use torchrun"
        )
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()


def _export(args: argparse.Namespace) -> Exported | Dense:
    where = {"output": args.output, "base": args.base}
    if args.mode == "adapter":
        return export_adapter(args.checkpoint, **where)
    about = {"merge_base": MergeBase(args.merge_base) if args.merge_base else None}
    shards = {"max_shard_size": args.max_shard_size} if args.max_shard_size else {}
    if args.mode == "exact":
        return export_exact(args.checkpoint, **where, **about, **shards)
    merging = {"fitting": _fitting(args), "dtype": DTYPES[args.dtype] if args.dtype else None}
    if args.mode == "dense":
        return export_dense(args.checkpoint, **where, **about, **shards, **merging)
    return export_lora(args.checkpoint, **where, **about, **merging)


def _fitting(args: argparse.Namespace) -> Fitting:
    names = ("split", "calibration_tokens", "refine_steps", "heldout_split", "heldout_labels", "max_length", "max_kl")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= {name: tuple(getattr(args, name)) for name in ("calibration", "heldout") if getattr(args, name)}
    return Fitting(**given, **({"fit": Fit(args.fit)} if args.fit else {}))


def _refusal(error: GoatError) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # What all ranks have found, the first one tells, and the launcher then ends the others.
        time.sleep(2)
    print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()

"""Write a trained checkpoint in a form that others load: ``python launch/export.py --checkpoint DIR --output DIR``."""

import argparse
import sys

from goat_ds.errors import ConfigError, GoatError
from goat_ds.export import Exported, MergeBase, export_adapter, export_exact


def main() -> None:
    """Read the command line, export, and say what was read and written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="an adapter, a checkpoint, or the output_dir of a run")
    parser.add_argument("--mode", choices=["adapter", "exact"], required=True, help="a PEFT folder or a whole model")
    parser.add_argument("--output", required=True, help="a new folder")
    parser.add_argument("--base", help="folder or hub name of the base, if it is not where the adapter says")
    parser.add_argument(
        "--merge_base",
        choices=[str(choice) for choice in MergeBase],
        help="which weights of the base: what its 4-bit weights stand for, or its unquantised ones; those that the "
        "adapter was trained on, if not given (exact)",
    )
    parser.add_argument("--max_shard_size", default="5GB", help="bytes of one weights file (exact)")
    args = parser.parse_args()
    try:
        adapter, report = _export(args)
    except GoatError as error:
        sys.exit(_refusal(error))
    print(f"read {adapter.path}\nwrote {args.output}")
    if report.merge_base:
        print(f"base weights: {report.merge_base}, {report.values}")


def _export(args: argparse.Namespace) -> Exported:
    if args.mode == "adapter":
        if args.merge_base:
            raise ConfigError(
                f"merge_base ({args.merge_base}) has no effect with --mode adapter, which writes no weight of the "
                "base; leave it out, or use --mode exact"
            )
        return export_adapter(args.checkpoint, output=args.output, base=args.base)
    return export_exact(
        args.checkpoint,
        output=args.output,
        base=args.base,
        merge_base=MergeBase(args.merge_base) if args.merge_base else None,
        max_shard_size=args.max_shard_size,
    )


def _refusal(error: GoatError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()

"""The checkpoints of a run: what they hold of it, when one may be missing, and which are kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goat_ds.distributed import ranks
from goat_ds.errors import SaveError
from goat_ds.train.config import OnSaveError, TrainConfig
from goat_ds.train.health import last_checkpoint
from goat_ds.train.metrics import Metrics
from goat_ds.train.resume import Resumption, allow_or_refuse, settings_of
from goat_ds.zero import checkpoint as checkpoints

logger = logging.getLogger(__name__)


class RunMemory:
    """What a run writes into its checkpoints to find itself again, and what it found there."""

    def __init__(self, resumption: Resumption, data_digest: str) -> None:
        checkpoint = resumption.checkpoint
        found: dict[str, Any] = checkpoint.run if checkpoint else {"tokens": 0, "data_sha256": data_digest}
        self.steps_done = checkpoint.step if checkpoint else 0
        self.tokens_done = int(found["tokens"])
        self._fixed = {
            # As given: on another number of ranks the accumulation is found anew.
            "settings": settings_of(resumption.given),
            "global_batch_size": resumption.global_batch_size,
            "data_sha256": data_digest,
        }
        if found["data_sha256"] != data_digest:
            allow_or_refuse(
                resumption.config,
                f"data ({', '.join(resumption.config.train_sources)}) is not what the run was trained on before; give "
                "the same records in the same order",
            )

    def after(self, metrics: Metrics) -> dict[str, Any]:
        """Return what the checkpoint of the running step holds of the run."""
        return self._fixed | {"tokens": metrics.tokens, "eval_loss": metrics.eval_loss}


def save(
    engine: Any,
    step: int,
    config: TrainConfig,
    *,
    run: dict[str, Any],
    base_fingerprint: dict[str, str] | None,
    write_beside: Callable[[Path], None] | None,
    earlier: Path | None,
    must_succeed: bool,
) -> Path | None:
    """Save a checkpoint, and delete those that are too many; return the newest that is there. A collective.

    Raises:
        SaveError: it was not written, and the run may not go on without.
    """
    try:
        saved = checkpoints.save_checkpoint(
            engine,
            output_dir=config.folder,
            step=step,
            run=run,
            base_fingerprint=base_fingerprint,
            write_beside=write_beside,
        )
    except SaveError as error:
        failed = f"{error}; {last_checkpoint(earlier)}"
        if must_succeed or config.on_save_error is OnSaveError.STOP:
            raise SaveError(f"{failed}; make room there, then --resume auto goes on from it") from error
        logger.warning(f"{failed}; going on without (on_save_error continue)")
        return earlier
    remove_surplus(config)
    return saved


def remove_surplus(config: TrainConfig) -> None:
    """Delete the checkpoints that save_total_limit does not keep.

    Kept are the newest, the one with the best eval_loss, and the last routed one before a dense finish.
    """
    if config.save_total_limit and ranks.is_first():
        try:
            checkpoints.keep_newest(config.folder, config.save_total_limit)
        except OSError as error:
            # The new one is there: what cannot be deleted is no reason to end a run.
            logger.warning(f"save_total_limit ({config.save_total_limit}) could not delete: {error}")

"""Check the weights of a base on disk against those an adapter was trained on, reading a few values of each layer."""

from transformers.pytorch_utils import Conv1D

from goat_ds.errors import ExportError
from goat_ds.export.adapter_file import Adapter
from goat_ds.export.stored_base import KeyMap, StoredBase
from goat_ds.tuner.fingerprint import LayerSample, fingerprint, sample_layer


def check_base(adapter: Adapter, base: StoredBase) -> None:
    """Check that a base has the weights that the adapter was trained on.

    It is not known where the adapter was trained on a base that was stored in 4 bits, or this one is.

    Args:
        adapter: Says in its config which weights those are.
        base: With its weights on disk.

    Raises:
        ExportError: it has others.
    """
    recorded = adapter.config.base_fingerprint
    if recorded is None or base.is_4bit:
        return
    samples = _samples(adapter, base)
    # Without a single layer under its name, the files follow another scheme than those of causal models.
    if samples and fingerprint(samples, dtype=recorded["dtype"])._asdict() != recorded:
        raise ExportError(
            f"base ({base.path}): its weights are not those that {adapter.path} was trained on; give the base of "
            "training with --base PATH"
        )


def _samples(adapter: Adapter, base: StoredBase) -> dict[str, LayerSample]:
    """Sample the adapted layers that a base's files hold; none where one is part of another tensor, or made of some."""
    keys, ties = KeyMap(base.skeleton), base.skeleton.all_tied_weights_keys
    key_of = {name: key for key in base.tensors if (name := keys.parameter(key))}
    samples = {}
    for path in adapter.layers:
        key = key_of.get(f"{path}.weight") or key_of.get(ties.get(f"{path}.weight", ""))
        if key is None or len(base.tensors[key].shape) != 2:
            continue
        if keys.is_converted(key):
            return {}
        weight = base.tensors[key].read()
        transposed = isinstance(base.skeleton.get_submodule(path), Conv1D)
        samples[path] = sample_layer(weight.T if transposed else weight)
    return samples

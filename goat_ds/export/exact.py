"""Write a routed model as a Hugging Face folder that needs transformers and nothing of ours.

Base tensors go from file to file one at a time, so memory holds the largest tensor and not the model.
"""

import copy
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from goat_ds.errors import ExportError
from goat_ds.export import modeling_goat
from goat_ds.export.adapter_file import Adapter, read_low_rank
from goat_ds.export.base_tensors import check_fit, tensors_to_write, trained_ties
from goat_ds.export.card import exact_card
from goat_ds.export.dequantize import MergeBase, choose_weights
from goat_ds.export.folder import check_new, check_room, new_folder
from goat_ds.export.merge_report import Exported, exact_report
from goat_ds.export.same_base import check_base
from goat_ds.export.stored_base import KeyMap, StoredBase, copy_terms, copy_tokenizer, find_base
from goat_ds.export.tensors import StoredTensor, plan_shards, write_shards


def export_exact(
    checkpoint: str | Path,
    *,
    output: str | Path,
    base: str | None = None,
    merge_base: MergeBase | None = None,
    max_shard_size: str = "5GB",
) -> Exported:
    """Write base weights, experts and modelling code to ``output``; the logits are those of the trained model.

    Args:
        checkpoint: An adapter folder, a checkpoint folder, or the output_dir of a run (its newest checkpoint).
        output: A new folder.
        base: Folder or hub name of the base, in place of the one in the adapter's config.
        merge_base: Which weights of the base are written; None: what the adapter was trained on.
        max_shard_size: Bytes of one weights file, such as ``5GB``.

    Returns:
        The adapter that was exported, and the report that stands beside the weights.

    Raises:
        ConfigError: an argument is wrong.
        ExportError: adapter or base is not whole, or they do not fit each other, or the base has other weights than
            that of training.
    """
    output = Path(output)
    check_new(output)
    adapter = read_low_rank(Path(checkpoint), mode="exact")
    found = find_base(adapter, base, weights=True)
    check_fit(adapter, found.skeleton)
    merge_base = choose_weights(adapter, found, merge_base)
    tensors = tensors_to_write(adapter, found, merge_base)
    check_base(adapter, found)
    config = config_to_write(adapter, found, merge_base)
    _check_names(tensors, config)
    shards = plan_shards(tensors, max_shard_size)
    assert isinstance(config.dtype, torch.dtype)
    report = exact_report(adapter, found, merge_base=merge_base, dtype=config.dtype)
    check_room(output, sum(tensor.num_bytes for tensor in tensors.values()))
    with new_folder(output) as folder:
        write_shards(tensors, shards, folder)
        config.save_pretrained(folder)
        shutil.copyfile(modeling_goat.__file__, folder / "modeling_goat.py")
        copy_terms(found.path, folder)
        # The run may have added tokens or a chat template to the base's tokenizer.
        for source in (found.path, adapter.path):
            copy_tokenizer(source, folder)
        (folder / "README.md").write_text(exact_card(adapter, report, title=output.name), encoding="utf-8")
        report.write(folder)
    return Exported(adapter, report)


def config_to_write(adapter: Adapter, base: StoredBase, merge_base: MergeBase) -> PreTrainedConfig:
    """Return the base's config, with what ``modeling_goat`` needs to know beside it."""
    config = copy.deepcopy(base.skeleton.config)
    config.architectures = [modeling_goat.GoatForCausalLM.__name__]
    config.auto_map = {"AutoModelForCausalLM": f"modeling_goat.{modeling_goat.GoatForCausalLM.__name__}"}
    config.goat = {
        "architecture": type(base.skeleton).__name__,
        "r": adapter.config.r,
        "num_experts": adapter.config.num_experts,
        "routing": str(adapter.config.routing),
        "top_k": adapter.config.top_k,
        "top_p": adapter.config.top_p,
        "max_threshold": adapter.config.max_threshold or 1 / adapter.config.num_choices,
        "temperature": adapter.config.temperature,
        "shared_experts": adapter.config.shared_experts,
        "shared_A": adapter.config.shared_A,
        "routed": adapter.is_routed,
        "residual": adapter.config.init.decomposes and not adapter.is_folded,
        "takes_gates": adapter.config.takes_gates,
        "adaptive_scale": adapter.config.adaptive_scale,
        "merge_base": str(merge_base),
        "layers": {path: adapter.scale(path) for path in adapter.layers},
    }
    if base.is_4bit:
        del config.quantization_config
    if merge_base is MergeBase.DEQUANT_W4:
        config.dtype = adapter.dtype
    if config.dtype is None:
        # Else transformers takes the first tensor's dtype, which may be that of an expert.
        config.dtype = next(t.dtype for t in base.tensors.values() if t.dtype.is_floating_point)
    if trained_ties(adapter, base.skeleton):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def _check_names(tensors: dict[str, StoredTensor], config: PreTrainedConfig) -> None:
    """Check that transformers will find every tensor's place, and a tensor for every place of an adapted layer."""
    with torch.device("meta"):
        model = modeling_goat.goat_class(config.goat["architecture"])._from_config(copy.deepcopy(config))
    keys = KeyMap(model)
    found = {keys.parameter(key) for key in tensors} | set(model.all_tied_weights_keys)
    wanted = {name for name in model.state_dict() if ".goat_" in name or ".base_layer." in name}
    lost = [*(key for key in tensors if keys.parameter(key) is None), *sorted(wanted - found)]
    if lost:
        raise ExportError(
            f"{config.goat['architecture']} cannot be exported: transformers would not place {', '.join(lost)}"
        )

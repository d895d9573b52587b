"""Write a trained adapter as a PEFT folder that stands alone: checked, with tokenizer and model card."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from goat_ds.export.adapter_file import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from goat_ds.export.card import adapter_card
from goat_ds.export.folder import check_new, new_folder
from goat_ds.export.merge_report import Exported, adapter_report
from goat_ds.export.same_base import check_base
from goat_ds.export.stored_base import copy_tokenizer, find_base


def export_adapter(checkpoint: str | Path, *, output: str | Path, base: str | None = None) -> Exported:
    """Copy an adapter to ``output`` for ``PeftModel.from_pretrained``; its tensors are checked and left as they are.

    Args:
        checkpoint: An adapter folder, a checkpoint folder, or the output_dir of a run (its newest checkpoint).
        output: A new folder.
        base: Folder or hub name of the base; the exported config then names this one.

    Returns:
        The adapter that was exported, and the report that stands beside it.

    Raises:
        ConfigError: an argument is wrong.
        ExportError: the adapter is not whole, or its base is not there, or is there with other weights.
    """
    output = Path(output)
    check_new(output)
    adapter = read_adapter(Path(checkpoint))
    found = find_base(adapter, base, weights=False)
    if base:
        adapter = replace(adapter, config=replace(adapter.config, base_model_name_or_path=base))
    if found.has_weights and found.is_buildable:
        check_base(adapter, found)
    report = adapter_report(adapter, found)
    with new_folder(output) as folder:
        shutil.copyfile(adapter.path / WEIGHTS_NAME, folder / WEIGHTS_NAME)
        values = json.loads((adapter.path / CONFIG_NAME).read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = adapter.config.base_model_name_or_path
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # The run may have added tokens or a chat template to the base's tokenizer.
        for source in (found.path, adapter.path):
            copy_tokenizer(source, folder)
        (folder / "README.md").write_text(adapter_card(adapter, report, title=output.name), encoding="utf-8")
        report.write(folder)
    return Exported(adapter, report)

"""The base model that an adapter was trained on: where it is, its weights by module name, its tokenizer's files."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from goat_ds.base.inspect import Base, inspect
from goat_ds.errors import ConfigError, ExportError, LeftoverError
from goat_ds.export.adapter_file import Adapter
from goat_ds.export.tensors import INDEX_NAME, StoredTensor, stored_tensors

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "tokenization_*.py",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
CHAT_TEMPLATES_FOLDER = "additional_chat_templates"
GENERATION_CONFIG = "generation_config.json"
LEGAL_PATTERNS = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class StoredBase:
    """A base model's folder."""

    path: Path
    name: str
    """What it was asked for by: a folder or a hub name."""
    inspected: Base | None = None
    """What it is, where somebody has asked already."""

    @cached_property
    def base(self) -> Base:
        """What it is.

        Raises:
            LeftoverError: it is not only a base.
            ExportError: transformers cannot tell without running code of its author.
        """
        if self.inspected is not None:
            return self.inspected
        try:
            return inspect(str(self.path), named=f"base ({self.path})")
        except LeftoverError:
            raise
        except ConfigError as error:
            raise ExportError(f"{error}; use --mode adapter") from error

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without weights, as ``AutoModelForCausalLM`` builds it.

        Raises:
            ExportError: transformers has no causal language model for it, or its weights are stored quantised in a
                way other than bitsandbytes' 4 bits.
        """
        if method := self.base.foreign_quantization:
            raise ExportError(
                f"base ({self.path}) is stored quantised ({method}), and exact export reads no quantisation but "
                "bitsandbytes in 4 bits; give the unquantised model with --base PATH"
            )
        try:
            return self.base.skeleton()
        except ConfigError as error:
            raise ExportError(
                f"base ({self.path}) is no causal language model that transformers builds; use --mode adapter ({error})"
            ) from error

    @property
    def is_4bit(self) -> bool:
        """Whether its linear layers are stored in bitsandbytes' 4 bits."""
        return self.base.is_4bit

    @property
    def is_buildable(self) -> bool:
        """Whether there is a ``skeleton``."""
        try:
            return self.skeleton is not None
        except ExportError:
            return False

    @property
    def has_weights(self) -> bool:
        """Whether its weights are on this disk, as safetensors."""
        files = self._weight_files()
        return bool(files) and all(file.is_file() for file in files)

    def _weight_files(self) -> list[Path]:
        index, single = self.path / INDEX_NAME, self.path / "model.safetensors"
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [self.path / name for name in sorted(set(weight_map.values()))]
        return [single] if single.is_file() else []

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The weights by their name on disk.

        Raises:
            ExportError: they are not here as safetensors.
        """
        files = self._weight_files()
        if not files:
            raise ExportError(
                f"base ({self.path}) has no model.safetensors; write it once with "
                "AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder) and give --base folder"
            )
        return {name: tensor for file in files for name, tensor in stored_tensors(file).items()}

    def is_packed(self, key: str) -> bool:
        """Whether a tensor holds 4-bit values, whose statistics stand beside it."""
        return f"{key}.absmax" in self.tensors

    def statistics(self, key: str) -> dict[str, StoredTensor]:
        """Return what bitsandbytes stores beside a packed tensor, under bitsandbytes' names."""
        prefix = f"{key}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def find_base(adapter: Adapter, base: str | None = None, *, weights: bool) -> StoredBase:
    """Return the base in a folder, in the Hugging Face cache or on the hub.

    Args:
        adapter: Whose base is wanted.
        base: Folder or hub name that takes the place of the one in the adapter's config.
        weights: Whether its weights are wanted too, should it have to be downloaded.

    Raises:
        ExportError: it is in none of these places.
    """
    name = base or adapter.config.base_model_name_or_path
    if not name:
        raise ExportError(f"{adapter.path} does not say which base it was trained on; give it with --base PATH")
    if (Path(name) / "config.json").is_file():
        return StoredBase(Path(name).resolve(), name)
    patterns = [*TOKENIZER_PATTERNS, f"{CHAT_TEMPLATES_FOLDER}/*", "*.json", *LEGAL_PATTERNS]
    if weights:
        patterns.append("model*.safetensors")
    revision = None if base else adapter.config.revision
    try:
        return StoredBase(Path(snapshot_download(name, revision=revision, allow_patterns=patterns)), name)
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        origin = "given with --base" if base else f"which {adapter.path} names"
        raise ExportError(
            f"base ({name}), {origin}, is neither a model folder nor a model that the Hugging Face cache or hub "
            "gives; say where it is with --base PATH"
        ) from error


class KeyMap:
    """Which parameter of a model each name in a checkpoint means, as ``from_pretrained`` decides it.

    Names on disk are not always those of the modules: old checkpoints lack a prefix, and experts of a mixture model
    are stored one by one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._parameters = model.state_dict()

    def parameter(self, key: str) -> str | None:
        """Return the parameter's name, or None where the model has no use for the tensor."""
        name, _ = self._rename(key)
        return name if name in self._parameters else None

    def is_converted(self, key: str) -> bool:
        """Whether the parameter is computed from the tensor (and others), instead of being it."""
        return self._rename(key)[1] is not None

    def _rename(self, key: str) -> tuple[str, str | None]:
        renamed = rename_source_key(key, self._renamings, self._converters, self._prefix, self._parameters)
        if renamed[0] not in self._parameters and key in self._parameters:
            return rename_source_key(key, [], [], self._prefix, self._parameters)
        return renamed


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model folder's tokenizer and chat templates, byte for byte."""
    _copy(source, target, TOKENIZER_PATTERNS)
    if (source / CHAT_TEMPLATES_FOLDER).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES_FOLDER, target / CHAT_TEMPLATES_FOLDER, dirs_exist_ok=True)


def copy_terms(source: Path, target: Path) -> None:
    """Copy a model folder's generation settings and licence."""
    _copy(source, target, (GENERATION_CONFIG, *LEGAL_PATTERNS))


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, target / path.name)

"""Find what a path or name stands for, and load it: a whole model, or an adapter on its base."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase

from goat_ds.base.inspect import Base, inspect
from goat_ds.data import load_tokenizer
from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError, first_line, raise_if_any
from goat_ds.evaluate.settings import Dtype, EvalSettings
from goat_ds.export import Adapter, check_rival_base, find_trained, read_adapter, was_4bit
from goat_ds.export.adapter_file import CONFIG_NAME
from goat_ds.export.same_base import check_base
from goat_ds.export.stored_base import find_base
from goat_ds.tuner.base_quantization import BaseQuantization
from goat_ds.tuner.config import GoatPeftType
from goat_ds.tuner.quantized import Packing, check_backend

LOOK_AT_CODE = "none of it was run; look at that code, then add --trust_remote_code"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is judged; nothing of it is loaded yet."""

    base: Base
    """The whole model; where there is an adapter, its base."""
    adapter: Path | None
    """Folder of the adapter."""
    method: str | None
    """PEFT's name for the adapter's method."""
    quantization: BaseQuantization | None
    """How the weights are quantised while they load; None: they stay as they are stored."""
    dtype: str
    """As ``from_pretrained`` takes it."""

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if self.adapter is None:
            return "exact export" if self.base.is_exact_export else "whole model"
        return f"{self.method} adapter"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the adapter's tokenizer if it brings one, else that of the weights.

        Raises:
            ConfigError: there is none.
        """
        if self.adapter is not None and any((self.adapter / name).is_file() for name in TOKENIZER_FILES):
            return load_tokenizer(str(self.adapter))
        return load_tokenizer(
            self.base.name, revision=self.base.revision, trust_remote_code=self.base.trust_remote_code
        )

    def load(self) -> Any:
        """Read the weights.

        Returns:
            A transformers model, or a PEFT model around one, on the accelerator if there is one.

        Raises:
            ConfigError: the files do not hold all weights, or not those of a causal language model.
        """
        try:
            model = self._load_weights()
            if self.adapter is not None:
                if self.method != GoatPeftType.GOAT and self.base.stored_quantization is None:
                    check_rival_base(model, self.adapter)
                model = PeftModel.from_pretrained(model, str(self.adapter))
        except ConfigError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"model ({self.adapter or self.base.name}) cannot be loaded: {error}") from error
        return model.eval()

    def _load_weights(self) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.base.name,
            config=copy.deepcopy(self.base.config),
            revision=self.base.revision,
            dtype=self.dtype,
            device_map={"": ranks.device()},
            trust_remote_code=self.base.trust_remote_code,
            output_loading_info=True,
            **self._quantizing(),
        )
        model, info = loaded
        if info["missing_keys"]:
            # transformers fills them with random numbers.
            raise ConfigError(f"weights ({self.base.name}) lack {', '.join(sorted(info['missing_keys'])[:8])}")
        return model

    def _quantizing(self) -> dict[str, Any]:
        # None would undo a quantisation that is stored.
        if self.quantization is None:
            return {}
        return {"quantization_config": BitsAndBytesConfig(**self.quantization.bitsandbytes_settings())}


def find_subject(settings: EvalSettings) -> Subject:
    """Return what ``--model`` and ``--base`` mean. Reads configs and the names of tensors, no weights.

    Raises:
        ConfigError: with all that is wrong with them.
        ExportError: a GOAT adapter is not whole.
    """
    path = Path(settings.model)
    if path.is_dir() and ((path / CONFIG_NAME).is_file() or not (path / "config.json").is_file()):
        folder = _trained_folder(path)
        if (folder / CONFIG_NAME).is_file():
            return _adapter_subject(settings, folder)
        # Where a run has trained every weight.
        return _whole_subject(replace(settings, model=str(folder)))
    return _whole_subject(settings)


def _trained_folder(path: Path) -> Path:
    try:
        return find_trained(path)
    except ConfigError:
        raise ConfigError(
            f"model ({path}) holds neither config.json, nor {CONFIG_NAME}, nor adapter/{CONFIG_NAME}, nor a "
            "checkpoint-<step>; give a model folder, an adapter folder, a checkpoint folder or the output_dir of a run"
        ) from None


def _whole_subject(settings: EvalSettings) -> Subject:
    problems = []
    if settings.base is not None:
        problems.append(f"base ({settings.base}) has no effect: model ({settings.model}) is no adapter; leave it out")
    try:
        base = inspect(
            settings.model, trust_remote_code=settings.trust_remote_code, exact=True, without_own_code=LOOK_AT_CODE
        )
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from error
    if base.is_exact_export and not settings.trust_remote_code:
        problems.append(
            f"model ({settings.model}) is an exact export: its modelling code lies beside its weights, and without it "
            "they would be read as another model; look at modeling_goat.py there, then add --trust_remote_code"
        )
    raise_if_any(problems)
    return Subject(
        base=base,
        adapter=None,
        method=None,
        quantization=None,
        dtype=settings.dtype.torch_name,
    )


def _adapter_subject(settings: EvalSettings, path: Path) -> Subject:
    peft_config = _peft_config(path)
    goat = read_adapter(path) if peft_config.peft_type == GoatPeftType.GOAT else None
    base = _base_of(path, peft_config, settings)
    is_stored = base.stored_quantization is not None
    if goat is None and was_4bit(path) and not is_stored:
        raise ConfigError(
            f"model ({path}) was trained on a base that its run made 4-bit, which PEFT's config has no word for; "
            "evaluate its merged form (python launch/export.py --mode dense --merge_base w16), or give a base that is "
            "stored in 4 bits with --base"
        )
    if goat is not None:
        raise_if_any(_misfits(goat, is_stored=is_stored))
        found = replace(find_base(goat, settings.base, weights=False), inspected=base)
        if found.has_weights and found.is_buildable:
            check_base(goat, found)
    trained = goat.quantization if goat else None
    return Subject(
        base=base,
        adapter=path,
        method=str(getattr(peft_config.peft_type, "value", peft_config.peft_type)),
        quantization=None if is_stored else trained,
        dtype=trained.dtype if trained and settings.dtype is Dtype.AUTO else settings.dtype.torch_name,
    )


def _peft_config(path: Path) -> Any:
    try:
        return PeftConfig.from_pretrained(str(path))
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"model ({path}) has no {CONFIG_NAME} that PEFT understands: {first_line(error)}") from error


def _base_of(path: Path, peft_config: Any, settings: EvalSettings) -> Base:
    """Find the base of an adapter by its config."""
    name = settings.base or peft_config.base_model_name_or_path
    if not name:
        raise ConfigError(f"model ({path}) does not say which base it was trained on; give it with --base PATH")
    # A revision that the adapter names is one of the base that it names.
    revision = (None if settings.base else peft_config.revision) or "main"
    origin = "given with --base" if settings.base else f"which {path} names"
    try:
        return inspect(
            name,
            named=f"base ({name}), {origin},",
            revision=revision,
            trust_remote_code=settings.trust_remote_code,
            without_own_code=LOOK_AT_CODE,
        )
    except ConfigError as error:
        way_out = "" if LOOK_AT_CODE in str(error) else "; say where it is with --base PATH"
        raise ConfigError(f"{error}{way_out}") from error


def _misfits(adapter: Adapter, *, is_stored: bool) -> Iterator[str]:
    """Yield why the base of training cannot be made again while it loads."""
    trained = adapter.quantization
    way_out = "evaluate its exact export (python launch/export.py --mode exact)"
    if adapter.is_folded and (trained or is_stored):
        yield (
            f"model ({adapter.path}): residual (fold) was subtracted before its base became 4-bit, which loading "
            f"cannot repeat; {way_out}"
        )
    if trained and not is_stored and trained.packing.block_size != Packing().block_size:
        yield (
            f"model ({adapter.path}) was trained on a base in {trained.packing}, and transformers quantises in blocks "
            f"of {Packing().block_size} only; {way_out}"
        )
    if trained or is_stored:
        try:
            check_backend(ranks.device())
        except ConfigError as error:
            yield from error.problems

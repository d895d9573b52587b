"""The settings of a run, and what can be wrong with their numbers. Every field is a flag of the same name."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from peft import PeftConfig

from goat_ds import demo
from goat_ds.arguments import flag, list_flag
from goat_ds.data import DataFormat
from goat_ds.data.sample import NUM_TOKENS
from goat_ds.errors import ConfigError
from goat_ds.method.routing import Routing
from goat_ds.method.scaling import Scaling
from goat_ds.method.spectrum import Init
from goat_ds.precision import Precision
from goat_ds.train.methods import LORA_PLUS_RATIO, Method, adapter_of
from goat_ds.tuner.base_quantization import BaseQuantization
from goat_ds.tuner.config import GoatConfig, Residual
from goat_ds.tuner.quantized import BLOCK_SIZES, Packing
from goat_ds.zero.adapters import Rates
from goat_ds.zero.engine import Attention, Checkpointing


class Schedule(StrEnum):
    """How the learning rate goes on after warm-up: transformers' schedules that need nothing but step numbers."""

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    CONSTANT = "constant"
    INVERSE_SQRT = "inverse_sqrt"


class OnSaveError(StrEnum):
    """What a checkpoint that cannot be written does to the run; the last one always ends it."""

    STOP = "stop"
    CONTINUE = "continue"


AUTO = "auto"
"""Value of ``resume``: the newest whole checkpoint of ``output_dir``, or the start where there is none."""
REQUIRED = ("model", "data", "output_dir")
"""Settings of which only the embedded demo has its own."""
POLYNOMIAL_END = 1e-7
"""Learning rate at the end of transformers' polynomial schedule."""


MIN_TIMEOUT_MINUTES, MAX_TIMEOUT_MINUTES = 0.1, 100_000.0
"""A shorter wait than six seconds would end runs on a busy machine; what libraries count waits in is finite."""

RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("micro_batch_size", "grad_accum_steps", "log_steps", "router_log_steps"), lambda n: n >= 1, "at least 1"),
    (("bnb_4bit_blocksize",), lambda n: n in BLOCK_SIZES, f"one of {', '.join(map(str, BLOCK_SIZES))}"),
    (
        (
            *("max_steps", "warmup_steps", "eval_steps", "save_steps", "save_total_limit", "calibration_sample_tokens"),
            *("weight_decay", "max_grad_norm", "seed"),
        ),
        lambda n: n >= 0,
        "at least 0",
    ),
    (("learning_rate", "lr_ratio_B", "router_lr", "adam_eps", "lora_alpha"), lambda n: n > 0, "above 0"),
    (
        ("timeout_minutes",),
        lambda n: MIN_TIMEOUT_MINUTES <= n <= MAX_TIMEOUT_MINUTES,
        f"in [{MIN_TIMEOUT_MINUTES}, {MAX_TIMEOUT_MINUTES}]",
    ),
    (("adam_beta1", "adam_beta2", "dropout"), lambda n: 0 <= n < 1, "in [0, 1)"),
    (("max_length",), lambda n: n >= 2, "at least 2"),
)
"""Settings, what their values must be, and how that is said."""


def _cache_folder(name: str) -> str:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "goat_ds", name)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run; every default is a working one, and together they train the embedded demo."""

    # -- the run
    config: str | None = flag(None, "YAML file with any of these settings; the command line wins")
    output_dir: str | None = flag(
        None, "folder of the run, new or empty: checkpoints, metrics.jsonl; runs/demo for the demo"
    )
    resume: str | None = flag(
        None, "checkpoint to go on from: auto (the newest whole one of output_dir, else from the start) or its folder"
    )
    allow_changed: bool = flag(False, "resume although settings changed that make it another run; each is reported")
    seed: int = flag(0, "seed of routers, dropout and the order of the data")
    dry_run: bool = flag(False, "check everything that can be checked without reading weights, then stop")
    timeout_minutes: float = flag(30.0, "minutes within which a rank that stops answering ends the run")
    local_rank: int | None = flag(None, "place of this process on its node, as the deepspeed launcher passes it")

    # -- model
    model: str | None = flag(None, "base model: folder or hub name; the embedded demo by default")
    precision: Precision = flag(Precision.BF16, "dtype of weights and products; master weights are fp32 in each")
    attn: Attention = flag(Attention.AUTO, "attention code; auto is FlashAttention-2 where it and a GPU are there")
    load_in_4bit: bool = flag(
        False, "quantise the frozen base to NF4, layer by layer, once experts have started from it"
    )
    bnb_4bit_blocksize: int = flag(64, "neighbouring values of a 4-bit weight that share a statistic")
    bnb_4bit_use_double_quant: bool = flag(False, "quantise the statistics of 4-bit weights too: 4.13 bits, not 4.5")
    bnb_4bit_compute_dtype: Precision | None = flag(
        None, "dtype that 4-bit weights are unpacked to and multiplied in; precision by default"
    )
    keep_in_high_precision: list[str] | None = list_flag(
        "names of linear layers, or of modules around them, that load_in_4bit leaves as they are"
    )
    gradient_checkpointing: Checkpointing = flag(Checkpointing.NONE, "recompute activations in backward, and how")

    # -- data
    data: list[str] | None = list_flag("training data: files, folders or hub names; repeatable; the demo's by default")
    eval_data: list[str] | None = list_flag("held-out data, in the same forms; repeatable")
    split: str = flag("train", "split of hub data sets to train on")
    eval_split: str = flag("test", "split of hub data sets to evaluate on")
    data_format: DataFormat | None = flag(None, "format of all data; recognised by its columns by default")
    max_length: int = flag(1024, "tokens of the longest record and of a pack")
    packing: bool = flag(True, "fill packs with several records, without attention across them")
    token_cache: str = flag(_cache_folder("tokens"), "folder that remembers tokenised data by content")

    # -- what is trained
    method: Method = flag(Method.GOAT, "what is trained; each has its line in docs/methods.md")
    peft_config: str | None = flag(
        None, "JSON file with the config of any PEFT method, as adapter_config.json holds it, in place of a method"
    )
    r: int = flag(32, "total rank of a layer; every expert has r / num_experts")
    num_experts: int = flag(8, "experts of a layer")
    routing: Routing = flag(Routing.TOP_K, "how a token chooses its experts")
    top_k: int = flag(2, "experts a token uses (top_k); num_experts means all, by their probabilities")
    top_p: float = flag(0.25, "probability that the experts a token uses reach together (top_p)")
    max_threshold: float | None = flag(
        None, "highest threshold of a token (threshold); 1 over the experts to choose among by default"
    )
    shared_experts: int = flag(0, "how many experts are always on; the router chooses among the others")
    temperature: float = flag(1.0, "divisor of the router's logits")
    expert_dropout: float = flag(0.0, "probability that an expert is left out for a token in training")
    router_noise: float = flag(0.0, "standard deviation of the noise on the router's logits in training")
    init: Init = flag(Init.GOAT, "where in the spectrum the experts start")
    scaling: Scaling = flag(Scaling.THEORY, "formula of the scale s")
    eta: float = flag(1.0, "ratio of the learning rates, full fine-tuning to LoRA (theory)")
    lora_alpha: float = flag(64.0, "numerator of the scales alpha and rslora")
    rho: float = flag(10.0, "divisor of the singular values the experts start from")
    adaptive_scale: bool = flag(False, "GOAT-s: scale each expert by its share of the spectrum")
    shared_A: bool = flag(False, "one A for all experts, as HydraLoRA; needs init zero")
    residual: Residual = flag(Residual.LOWRANK, "where and by which gates the start's contribution is taken off")
    rho_warmup_steps: int = flag(0, "steps over which the residual goes from gated to lowrank")
    balance_coef: float = flag(1e-3, "weight of the balance loss, summed over layers")
    dropout: float = flag(0.0, "probability that an input of the experts is zeroed")
    target_modules: list[str] | None = list_flag(
        "names of the layers to adapt, or one regular expression of whole paths; all-linear by default"
    )
    exclude_modules: list[str] | None = list_flag(
        "names of layers to leave out, or one regular expression of whole paths"
    )
    svd_cache: str = flag(_cache_folder("svd"), "folder that remembers decompositions by content")

    # -- optimisation
    ds_config: str | None = flag(
        None, "DeepSpeed config: a file, or a shipped one by its name, such as zero3 (required)"
    )
    max_steps: int = flag(0, "steps of the run; 0 means num_epochs decides")
    num_epochs: float = flag(3.0, "passes over the data, when max_steps is 0")
    micro_batch_size: int = flag(1, "packs in one forward of one rank")
    grad_accum_steps: int = flag(1, "forwards of one rank in one step")
    learning_rate: float = flag(1e-4, "peak learning rate of AdamW")
    lr_scheduler: Schedule = flag(Schedule.COSINE, "schedule after warm-up; constant is without any")
    warmup_steps: int | None = flag(None, "steps of linear warm-up; 100 by default, or a tenth of a shorter run")
    lr_ratio_B: float | None = flag(
        None, "learning rate of the factors B, as a multiple of learning_rate; 1 by default, 16 for lora_plus"
    )
    router_lr: float | None = flag(None, "peak learning rate of the routers; learning_rate by default")
    weight_decay: float = flag(0.0, "AdamW's decoupled decay")
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment")
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment")
    adam_eps: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "norm the gradient is clipped to; 0 switches clipping off")
    dense_finish: float = flag(
        0.0, "share of the run after which experts become dense and train on without routers; 0 means never"
    )

    # -- watching
    log_steps: int = flag(1, "steps between lines of metrics.jsonl")
    router_log_steps: int = flag(10, "steps between lines of routers.jsonl (load of every expert of every layer)")
    eval_steps: int = flag(0, "steps between evaluations; 0 means only at the end")
    save_steps: int = flag(0, "steps between checkpoints; 0 means only at the end")
    save_total_limit: int = flag(
        0, "checkpoints to keep: the newest so many, and the one with the best eval_loss; 0 keeps all"
    )
    on_save_error: OnSaveError = flag(
        OnSaveError.STOP, "what a checkpoint that cannot be written does; the last one always stops the run"
    )
    calibration_sample_tokens: int = flag(
        NUM_TOKENS, "tokens of the training data that a checkpoint keeps to fit exports on; 0 keeps none"
    )

    def adapter(self) -> PeftConfig | None:
        """Return the settings of what the method puts on the base; None for full fine-tuning.

        ``peft_config`` is a file, and has no say here: ``train.inputs`` reads it.

        Raises:
            ConfigError: one line a problem.
        """
        if self.method is not Method.GOAT:
            return adapter_of(self.method, self, names_of=_names_or_pattern)
        values = {name: getattr(self, name) for name in GOAT_FLAGS}
        for name in ("target_modules", "exclude_modules"):
            values[name] = _names_or_pattern(values[name])
        return GoatConfig(task_type="CAUSAL_LM", **values)

    @property
    def rates(self) -> Rates:
        """The peak learning rates of the parts of what is trained."""
        default = LORA_PLUS_RATIO if self.method is Method.LORA_PLUS else 1.0
        ratio = default if self.lr_ratio_B is None else self.lr_ratio_B
        return Rates(self.learning_rate, ratio, self.router_lr)

    def quantization(self) -> BaseQuantization | None:
        """Return how the base becomes 4-bit; None: not at all."""
        if not self.load_in_4bit:
            return None
        dtype = self.precision.torch_name
        return BaseQuantization(
            packing=Packing(block_size=self.bnb_4bit_blocksize, double_quant=self.bnb_4bit_use_double_quant),
            dtype=dtype,
            weight_dtype=dtype,
            compute_dtype=(self.bnb_4bit_compute_dtype or self.precision).torch_name,
            kept=tuple(self.keep_in_high_precision or ()),
        )

    @property
    def routes(self) -> bool:
        """Whether the method has experts and a router to choose among them."""
        if self.peft_config is not None:
            return False
        try:
            adapter = self.adapter()
        except ConfigError:
            # Reported by itself.
            return True
        return isinstance(adapter, GoatConfig) and adapter.num_experts > 1

    @property
    def is_demo(self) -> bool:
        """Whether the run trains the embedded demo, because neither model nor data is given."""
        return self.model is None and not self.data

    @property
    def base_name(self) -> str:
        """Folder or hub name of the base."""
        return self.model or str(demo.base_path())

    @property
    def train_sources(self) -> list[str]:
        """The sources to train on."""
        return [str(demo.train_data())] if self.is_demo else list(self.data or ())

    @property
    def eval_sources(self) -> list[str]:
        """The held-out sources; may be empty."""
        return [str(demo.heldout_data())] if self.is_demo and not self.eval_data else list(self.eval_data or ())

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir or "runs/demo")

    def warmup_of(self, num_steps: int) -> int:
        """Return the steps of warm-up in a run of ``num_steps``."""
        return min(100, num_steps // 10) if self.warmup_steps is None else self.warmup_steps

    def check_rho_warmup(self, num_steps: int) -> None:
        """Check that the residual has warmed up by the end of a run of ``num_steps``.

        Raises:
            ConfigError: it has not, so the model that is trained is not the one that is evaluated and kept.
        """
        if self.rho_warmup_steps >= num_steps:
            raise ConfigError(
                f"rho_warmup_steps ({self.rho_warmup_steps}) must be below the steps of the run ({num_steps}); warm up "
                "for fewer, or train with residual gated"
            )

    def finish_after(self, num_steps: int) -> int | None:
        """Return the step of a run of ``num_steps`` after which experts become dense; None: they never do.

        Raises:
            ConfigError: nothing would come before it or after it.
        """
        if not self.dense_finish:
            return None
        # A product such as 0.29 * 100 falls short of a whole number by rounding alone.
        step = math.floor(self.dense_finish * num_steps + 1e-9)
        if not 0 < step < num_steps:
            raise ConfigError(
                f"dense_finish ({self.dense_finish}) is after step {step} of {num_steps}; it must leave steps before "
                "and after it"
            )
        if step < self.rho_warmup_steps:
            raise ConfigError(
                f"dense_finish ({self.dense_finish}) is after step {step} of {num_steps}, and rho_warmup_steps "
                f"({self.rho_warmup_steps}) must be over by then; finish later, or warm up for fewer steps"
            )
        return step

    def packs_per_step(self, world_size: int) -> int:
        """Return the packs of a global batch as these settings have it on so many ranks."""
        return self.micro_batch_size * self.grad_accum_steps * world_size

    @property
    def adam_betas(self) -> tuple[float, float]:
        """AdamW's decays of the moments."""
        return self.adam_beta1, self.adam_beta2

    def problems(self, *, required: Sequence[str] = REQUIRED) -> Iterator[str]:
        """Yield, one line each, what is wrong with the numbers.

        Args:
            required: Settings that must be given, unless the embedded demo's are taken.
        """
        try:
            self.adapter()
        except ConfigError as error:
            yield from error.problems
        yield from self._absent(required)
        yield from self._out_of_range()
        yield from self._schedule_problems()
        yield from self._finish_problems()
        yield from self._rate_problems()
        if self.eval_steps and not self.eval_data and not self.is_demo:
            yield f"eval_steps ({self.eval_steps}) is set and eval_data is not"

    def _absent(self, required: Sequence[str]) -> Iterator[str]:
        if self.ds_config is None:
            yield "ds_config is required, for example --ds_config ds_configs/zero3.json"
        if not self.is_demo:
            for name in required:
                if not getattr(self, name):
                    yield f"{name} is required; only the embedded demo (no model, no data) has one of its own"

    def _out_of_range(self) -> Iterator[str]:
        for names, is_right, rule in RANGES:
            for name in names:
                value = getattr(self, name)
                if name in GOAT_FLAGS and self.method is Method.GOAT:
                    # GoatConfig says it itself.
                    continue
                if value is not None and not is_right(value):
                    yield f"{name} ({value}) must be {rule}"

    def _schedule_problems(self) -> Iterator[str]:
        if self.max_steps == 0 and not self.num_epochs > 0:
            yield f"num_epochs ({self.num_epochs}) must be above 0 when max_steps is 0"
        if self.lr_scheduler is Schedule.CONSTANT and self.warmup_steps:
            yield (
                f"warmup_steps ({self.warmup_steps}) has no effect with lr_scheduler constant; use constant_with_warmup"
            )
        if self.lr_scheduler is Schedule.POLYNOMIAL and not self.learning_rate > POLYNOMIAL_END:
            yield f"learning_rate ({self.learning_rate}) must be above {POLYNOMIAL_END}, where polynomial ends"
        if self.max_steps and (self.warmup_steps or 0) >= self.max_steps:
            yield f"warmup_steps ({self.warmup_steps}) must be below max_steps ({self.max_steps})"
        if self.max_steps > 0:
            try:
                self.check_rho_warmup(self.max_steps)
            except ConfigError as error:
                yield from error.problems

    @property
    def _without_router(self) -> str:
        """What says that nothing is routed."""
        if self.peft_config is not None:
            return f"peft_config ({self.peft_config})"
        return f"num_experts {self.num_experts}" if self.method is Method.GOAT else f"method {self.method}"

    def _rate_problems(self) -> Iterator[str]:
        if self.router_lr is not None and not self.routes:
            yield f"router_lr ({self.router_lr}) has no effect with {self._without_router}; leave it out"
        if self.lr_ratio_B is not None and self.method in (Method.FULL, Method.FULL_MOE):
            yield (
                f"lr_ratio_B ({self.lr_ratio_B}) has no effect with method {self.method}, which has no factor B; leave "
                "it out"
            )

    def _finish_problems(self) -> Iterator[str]:
        if not 0 <= self.dense_finish < 1:
            yield f"dense_finish ({self.dense_finish}) must be in [0, 1)"
            return
        if self.dense_finish and not self.routes:
            yield f"dense_finish ({self.dense_finish}) has no effect with {self._without_router}; leave it out"
        if self.dense_finish and self.shared_A:
            yield (
                f"dense_finish ({self.dense_finish}) gives every expert a dense A of its own, and shared_A has one for "
                "all; leave one of them out, or export the trained model with --mode dense"
            )
        if self.dense_finish and self.method is Method.FULL_MOE and self.routes:
            yield (
                f"dense_finish ({self.dense_finish}) fits low-rank experts, and those of method full_moe are whole "
                "copies of the weights; leave it out"
            )
        if self.dense_finish and self.precision is Precision.FP16:
            yield f"dense_finish ({self.dense_finish}) would restart the loss scale of precision fp16; use bf16 or fp32"
        if self.max_steps > 0:
            try:
                self.finish_after(self.max_steps)
            except ConfigError as error:
                yield from error.problems


def _names_or_pattern(values: list[str] | None) -> list[str] | str | None:
    """Return the names, or the one word that is not a name: all-linear, or a regular expression."""
    if (
        values is not None
        and len(values) == 1
        and (values[0] == "all-linear" or not re.fullmatch(r"[\w.-]+", values[0]))
    ):
        return values[0]
    return values


GOAT_FLAGS = tuple(
    sorted({f.name for f in dataclasses.fields(GoatConfig)} & {f.name for f in dataclasses.fields(TrainConfig)})
)
"""The flags of the adapter, which only GOAT takes all of."""

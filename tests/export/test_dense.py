"""Dense and lora exports are the nearest dense model, load without goat_ds, agree, and say what they cost."""

import json
import resource
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

from goat_ds import ConfigError, ExportError
from goat_ds.data.batches import filler
from goat_ds.data.sample import SAMPLE_FEATURES, SAMPLE_NAME, Sample, load_sample, save_sample
from goat_ds.export import Fit, Fitting, MergeBase, export_dense, export_lora, fit, read_adapter, refine
from goat_ds.export.calibration import packs_of
from goat_ds.export.stored_base import find_base
from goat_ds.export.trained import DENSE, load_trained
from goat_ds.method.spectrum import Factors
from goat_ds.tuner.model import named_experts
from tests.export.conftest import (
    ARCHITECTURES,
    TOKENS,
    Trained,
    adapt,
    become_dense,
    in_4bit,
    store_4bit,
    train,
    write_base,
)
from tests.launching import run_ranks

# transformers 5.23 deprecates what PEFT 0.21 asks every model for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MERGEABLE = [name for name in ARCHITECTURES if name != "mixtral"]


def documents(num_documents: int, *, seed: int) -> Dataset:
    """Draw documents of 20 tokens, the last 8 of them labels."""
    draws = torch.randint(3, 64, (num_documents, 20), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict(
        {
            "input_ids": draws,
            "labels": [[-100] * 12 + draw[12:] for draw in draws],
            "num_tokens": [20] * num_documents,
            "num_labels": [8] * num_documents,
        },
        features=SAMPLE_FEATURES,
    )


def keep_sample(adapter: Path, *, num_documents: int = 40) -> None:
    sample = Sample(documents(num_documents, seed=1), documents(8, seed=2), 40)
    save_sample(sample, adapter.parent / SAMPLE_NAME)


@pytest.fixture
def kept(trained: Trained) -> Trained:
    """A LLaMA base and its adapter, with a sample of tokens beside it."""
    keep_sample(trained.adapter)
    return trained


def static_logits(trained: Trained, forms: dict[str, Tensor]) -> Tensor:
    """What the model says with ``A'`` in the place of gates and ``A``, computed by plain hooks."""
    model: Any = trained.model

    def replaced(experts: Any, args: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        x, base = args
        path = next(i.path for i in named_experts(model, "default") if i.experts is experts)
        h = x @ forms[path.removeprefix("base_model.model.")].T @ experts.B.T
        return base + experts.scale * (h - x @ experts.A0.T @ experts.B0.T / experts.config.num_experts)

    hooks = [i.experts.register_forward_hook(replaced) for i in named_experts(model, "default")]
    try:
        return trained.logits()
    finally:
        for hook in hooks:
            hook.remove()


def slow_forms(trained: Trained) -> dict[str, Tensor]:
    """``A'`` of every layer by plain least squares on the inputs that plain hooks catch."""
    inputs: dict[str, list[Tensor]] = {}
    model: Any = trained.model
    layers = {i.path.removeprefix("base_model.model."): i.experts for i in named_experts(model, "default")}
    hooks = [
        experts.register_forward_pre_hook(
            lambda _, args, path=path: inputs.setdefault(path, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for path, experts in layers.items()
    ]
    with torch.no_grad():
        for row in documents(40, seed=1)["input_ids"]:
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    forms = {}
    for path, experts in layers.items():
        x = torch.cat(inputs[path])
        top, index = (x @ experts.router.T).topk(experts.config.top_k)
        gates = torch.zeros(len(x), experts.config.num_experts).scatter(-1, index, top.softmax(dim=-1))
        h = gates.repeat_interleave(experts.config.expert_rank, dim=1) * (x @ experts.A.T)
        forms[path] = torch.linalg.lstsq(x.double(), h.detach().double()).solution.T.float()
    return forms


def test_the_fit_is_least_squares_on_what_each_layer_sees(
    tmp_path: Path, kept: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "fit_dense", partial(fit.fit_dense, ridge=1e-9))
    export_dense(kept.adapter, output=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, static_logits(kept, slow_forms(kept)), rtol=1e-3, atol=1e-3)


def test_layers_that_do_not_fit_into_memory_are_fitted_in_passes(kept: Trained) -> None:
    adapter = read_adapter(kept.adapter)
    trained = load_trained(adapter, find_base(adapter, weights=True), MergeBase.W16, dtype=torch.float32)
    sample = load_sample(kept.adapter.parent / SAMPLE_NAME)
    packs = packs_of(sample.calibration, find_base(adapter, weights=True), max_length=sample.max_length)
    forwards: list[int] = []
    hook = trained.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    at_once = fit.fit_layers(trained, packs)
    assert len(forwards) == len(packs.packs)
    in_passes = fit.fit_layers(trained, packs, max_bytes=1)
    # Four inputs a block: of q, k and v, of o, of gate and up, and of down.
    assert len(forwards) == len(packs.packs) * (1 + 2 * 4)
    hook.remove()
    assert list(at_once) == list(in_passes)
    for path, found in at_once.items():
        torch.testing.assert_close(found, in_passes[path], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", MERGEABLE)
def test_dense_and_lora_load_with_plain_libraries_and_agree(tmp_path: Path, architecture: str) -> None:
    trained = train(tmp_path, architecture)
    keep_sample(trained.adapter)
    export_dense(trained.adapter, output=tmp_path / "dense")
    export_lora(trained.adapter, output=tmp_path / "lora")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense).__name__ == type(trained.model.get_base_model()).__name__
    base = AutoModelForCausalLM.from_pretrained(trained.base)
    lora = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 16
    with torch.no_grad():
        logits = dense(input_ids=TOKENS).logits
        torch.testing.assert_close(lora(input_ids=TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
        with lora.disable_adapter():
            assert (lora(input_ids=TOKENS).logits - logits).abs().max() > 0.1
    reports = [json.loads((tmp_path / mode / "merge_report.json").read_text()) for mode in ("dense", "lora")]
    assert reports[0]["merged"]["loss"] == pytest.approx(reports[1]["merged"]["loss"], rel=1e-4)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "merge_report.json").read_text())


def test_the_report_says_what_merging_costs_as_slow_code_finds_it(tmp_path: Path, kept: Trained) -> None:
    export_dense(kept.adapter, output=tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    losses, divergences, same = {"trained": [], "merged": []}, [], []
    for document in documents(8, seed=2):
        ids, labels = torch.tensor([document["input_ids"]]), torch.tensor(document["labels"])
        positions = (labels != -100).nonzero()[:, 0]
        with torch.no_grad():
            logits = {
                "trained": kept.model(input_ids=ids).logits[0, positions - 1],
                "merged": dense(input_ids=ids).logits[0, positions - 1],
            }
        for name, found in logits.items():
            losses[name] += nn.functional.cross_entropy(found, labels[positions], reduction="none").tolist()
        trained, merged = (found.log_softmax(dim=-1) for found in logits.values())
        divergences += (trained.exp() * (trained - merged)).sum(dim=-1).tolist()
        same += (trained.argmax(dim=-1) == merged.argmax(dim=-1)).tolist()
    report, num = report_of(tmp_path / "out"), len(divergences)
    assert report["heldout_labels"] == num == 64
    assert report["trained_loss"] == pytest.approx(sum(losses["trained"]) / num, rel=1e-4)
    assert report["merged"]["loss"] == pytest.approx(sum(losses["merged"]) / num, rel=1e-4)
    assert report["merged"]["kl"] == pytest.approx(sum(divergences) / num, rel=1e-3)
    assert report["merged"]["agreement"] == pytest.approx(sum(same) / num)
    assert report["mean_gates"]["kl"] > report["merged"]["kl"] > 0
    assert [layer["path"] for layer in report["layers"]] == sorted(
        (layer["path"] for layer in report["layers"]),
        key=lambda path: -next(layer["unexplained"] for layer in report["layers"] if layer["path"] == path),
    )
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"{report['merged']['loss']:.4f}" in readme


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"residual": "fold", "rho": 1.0},
        {"adaptive_scale": True},
        {"residual": "gated", "adaptive_scale": True, "shared_experts": 1},
        {"routing": "threshold"},
        {"init": "zero", "shared_A": True, "top_k": 4, "temperature": 0.5},
        {"routing": "top_p", "shared_experts": 2},
    ],
    ids=str,
)
def test_what_was_judged_in_memory_is_what_was_written(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained = train(tmp_path, "llama", **settings)
    keep_sample(trained.adapter)
    export_dense(trained.adapter, output=tmp_path / "mean", fitting=Fitting(fit=Fit.MEAN))
    mean = report_of(tmp_path / "mean")
    assert mean["merged"]["loss"] == pytest.approx(mean["mean_gates"]["loss"], rel=1e-5)
    assert mean["merged"]["kl"] == pytest.approx(mean["mean_gates"]["kl"], rel=1e-3)
    # Steps too small to move anything, so that the fit in memory is what is written.
    export_dense(trained.adapter, output=tmp_path / "fitted")
    export_dense(trained.adapter, output=tmp_path / "refined", fitting=Fitting(refine_steps=1))
    fitted, refined = report_of(tmp_path / "fitted"), report_of(tmp_path / "refined")
    assert refined["fitted"]["kl"] == pytest.approx(fitted["merged"]["kl"], rel=1e-3)
    lost = fitted["mean_gates"]["loss"] - fitted["trained_loss"]
    if lost > 0:
        closed = (fitted["mean_gates"]["loss"] - fitted["merged"]["loss"]) / lost
        assert fitted["gap_closed"] == pytest.approx(closed) and mean["gap_closed"] == pytest.approx(0, abs=1e-3)
    else:
        assert fitted["gap_closed"] is None


def test_another_base_counts_into_what_merging_costs(tmp_path: Path) -> None:
    four_bit = train(tmp_path / "nf4", "llama", **in_4bit())
    keep_sample(four_bit.adapter)
    export_dense(four_bit.adapter, output=tmp_path / "w4", merge_base=MergeBase.DEQUANT_W4)
    export_dense(four_bit.adapter, output=tmp_path / "w16", merge_base=MergeBase.W16)
    same, other = report_of(tmp_path / "w4"), report_of(tmp_path / "w16")
    assert same["trained_loss"] == pytest.approx(other["trained_loss"], rel=1e-5)
    assert other["merged"]["kl"] > same["merged"]["kl"]
    assert other["values"].startswith("not those of training, which computed with 4-bit weights (nf4")


def test_the_card_of_a_lora_loads_the_base_it_was_merged_for(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", **in_4bit())
    keep_sample(trained.adapter)
    export_lora(trained.adapter, output=tmp_path / "w4")
    export_lora(trained.adapter, output=tmp_path / "w16", merge_base=MergeBase.W16)
    assert "BitsAndBytesConfig(" in (tmp_path / "w4" / "README.md").read_text()
    assert "BitsAndBytesConfig" not in (tmp_path / "w16" / "README.md").read_text()


def test_a_base_that_lacks_a_weight_is_refused(tmp_path: Path, kept: Trained) -> None:
    weights = load_file(kept.base / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, kept.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"has no tensor for model.embed_tokens.weight; give a base that is whole"):
        export_dense(kept.adapter, output=tmp_path / "out")


def test_values_that_are_not_finite_are_told_by_their_layer(tmp_path: Path, trained: Trained) -> None:
    weights = load_file(trained.adapter / "adapter_model.safetensors")
    weights["base_model.model.model.layers.1.mlp.up_proj.goat_A"][0, 0] = float("inf")
    save_file(weights, trained.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    keep_sample(trained.adapter)
    with pytest.raises(ExportError, match=r"layers.1.mlp.up_proj computes values that are not finite"):
        export_dense(trained.adapter, output=tmp_path / "out")


def test_a_disk_without_room_is_found_before_anything_is_fitted(
    tmp_path: Path, kept: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("goat_ds.export.folder.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(fit, "fit_dense", None)
    with pytest.raises(ExportError, match=r"output \(.*\) needs [\d.]+ GiB, and its disk has 0.00 GiB left"):
        export_dense(kept.adapter, output=tmp_path / "out")


def test_an_architecture_that_mixes_packed_records_gets_a_row_a_record(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    write_base(tmp_path / "base", config)
    trained = adapt(tmp_path / "base", tmp_path / "adapter")
    keep_sample(trained.adapter)
    export_dense(trained.adapter, output=tmp_path / "out")
    losses = []
    for document in documents(8, seed=2):
        ids, labels = torch.tensor([document["input_ids"]]), torch.tensor([document["labels"]])
        with torch.no_grad():
            losses.append(float(trained.model(input_ids=ids, labels=labels).loss))
    assert report_of(tmp_path / "out")["trained_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_flags_without_effect_are_refused_by_name(tmp_path: Path, kept: Trained) -> None:
    useless = Fitting(max_length=32, split="train", heldout_split="test")
    with pytest.raises(ConfigError) as caught:
        export_dense(kept.adapter, output=tmp_path / "out", fitting=useless)
    assert len(caught.value.problems) == 3
    assert "max_length (32) has no effect: no data is named; leave it out" in caught.value.problems
    (tmp_path / "a.jsonl").touch()
    same = Fitting(calibration=(str(tmp_path / "a.jsonl"),), heldout=(str(tmp_path / "a.jsonl"),))
    with pytest.raises(ConfigError, match=r"heldout \(.*a.jsonl\) is fitted on"):
        export_dense(kept.adapter, output=tmp_path / "out", fitting=same)


def test_refinement_makes_the_divergence_smaller_and_says_by_how_much(
    tmp_path: Path, kept: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny model with random weights takes larger steps than a real one.
    monkeypatch.setattr(refine, "LEARNING_RATE", 1e-2)
    export_dense(kept.adapter, output=tmp_path / "out", fitting=Fitting(refine_steps=40))
    report = report_of(tmp_path / "out")
    assert report["refine_kept"] and report["refine_steps"] == 40
    assert report["merged"]["kl"] < 0.95 * report["fitted"]["kl"]


def test_refinement_follows_the_mean_divergence_at_labels_and_that_at_other_positions(kept: Trained) -> None:
    adapter = read_adapter(kept.adapter)
    base = find_base(adapter, weights=True)
    model = load_trained(adapter, base, MergeBase.W16, dtype=torch.float32)
    sample = load_sample(kept.adapter.parent / SAMPLE_NAME)
    packs = packs_of(sample.calibration, base, max_length=sample.max_length)
    batch = next(row for row in packs.micro_batches(shared=False) if len(row.label_index))
    others = torch.arange(2)
    model.set_dense({path: Factors(e.A.detach() / 4, e.B.detach()) for path, e in model.experts().items()})
    factors = [factor for experts in model.experts(DENSE).values() for factor in (experts.A, experts.B)]
    kl = refine._gradients(model, batch, others, factors)
    found = [factor.grad for factor in factors]
    for factor in factors:
        factor.grad = None

    def log_probs() -> Tensor:
        output = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        return torch.log_softmax(output.logits[0], dim=-1)

    wanted = log_probs().detach()
    with model.computing_with(DENSE):
        for factor in factors:
            factor.requires_grad_(True)
        kl_T = (wanted.exp() * (wanted - log_probs())).sum(-1)
        (kl_T[batch.label_index].mean() + kl_T[others].mean()).backward()
    torch.testing.assert_close(kl, kl_T[batch.label_index].mean().detach())
    torch.testing.assert_close(found, [factor.grad for factor in factors])


def test_refinement_looks_at_other_positions_than_labels_and_at_others_each_time() -> None:
    labels = torch.tensor([3, 4, 90])
    batch = filler()._replace(input_ids=torch.zeros(1, 100, dtype=torch.int64), label_index=labels)
    chance = torch.Generator().manual_seed(0)
    chosen = [set(refine._others(batch, chance).tolist()) for _ in range(20)]
    assert all(len(places) == refine.NUM_OTHERS for places in chosen)
    assert set.union(*chosen) == set(range(100)) - set(labels.tolist())
    short = batch._replace(input_ids=torch.zeros(1, 5, dtype=torch.int64), label_index=labels[:2])
    assert sorted(refine._others(short, chance).tolist()) == [0, 1, 2]


def test_refinement_that_does_not_help_is_taken_back(
    tmp_path: Path, kept: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "LEARNING_RATE", 10.0)
    export_dense(kept.adapter, output=tmp_path / "refined", fitting=Fitting(refine_steps=3))
    export_dense(kept.adapter, output=tmp_path / "fitted")
    report = report_of(tmp_path / "refined")
    assert not report["refine_kept"] and report["merged"]["kl"] == pytest.approx(report["fitted"]["kl"], rel=1e-4)
    refined, fitted = (load_file(tmp_path / name / "model.safetensors") for name in ("refined", "fitted"))
    assert all(torch.equal(refined[key], fitted[key]) for key in fitted)


@pytest.mark.parametrize("merge_base", [MergeBase.DEQUANT_W4, MergeBase.W16])
@pytest.mark.parametrize("residual", ["lowrank", "fold"])
def test_weights_of_a_4bit_base_are_those_asked_for_plus_what_experts_add(
    tmp_path: Path, merge_base: MergeBase, residual: str
) -> None:
    trained = train(tmp_path, "llama", residual=residual, **in_4bit())
    # Enough that the fit learns more than the noise of its sample.
    keep_sample(trained.adapter, num_documents=160)
    export_dense(trained.adapter, output=tmp_path / "out", merge_base=merge_base)
    report = report_of(tmp_path / "out")
    assert report["merge_base"] == str(merge_base)
    # Whichever weights were merged with, the experts' part was fitted on top of them.
    assert report["merged"]["kl"] < report["mean_gates"]["kl"]
    written, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(trained.base / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj"
    layer: Any = next(i.layer for i in named_experts(trained.model, "default") if i.path.endswith(path))
    values = layer.base_layer.weight_OI(torch.float32) if merge_base is MergeBase.DEQUANT_W4 else base[f"{path}.weight"]
    delta = written[f"{path}.weight"] - values
    rank = 8 if residual == "fold" and merge_base is MergeBase.DEQUANT_W4 else 16
    singular = torch.linalg.svdvals(delta.double())
    assert singular[rank - 1] > 1e-4 and singular[rank] < 1e-4


def test_a_base_that_is_stored_in_4_bits_leaves_as_plain_weights(tmp_path: Path) -> None:
    write_base(tmp_path / "plain", ARCHITECTURES["llama"])
    base = store_4bit(tmp_path / "plain", tmp_path / "base", bnb_4bit_use_double_quant=True)
    trained = adapt(base, tmp_path / "adapter")
    keep_sample(trained.adapter)
    export_dense(trained.adapter, output=tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(dense.config, "quantization_config")
    assert report_of(tmp_path / "out")["merged"]["kl"] < report_of(tmp_path / "out")["mean_gates"]["kl"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapted_output_layer_leaves_its_tie(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama_tied", target_modules=["lm_head", "q_proj"])
    keep_sample(trained.adapter)
    export_dense(trained.adapter, output=tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = load_file(trained.base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(dense.model.embed_tokens.weight, embedding)
    assert (dense.lm_head.weight - embedding).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_output_layer_is_fitted_on_every_label_and_other_layers_on_every_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(tmp_path, "llama", target_modules=["lm_head", "q_proj"])
    keep_sample(trained.adapter)
    counts: list[int] = []
    real = fit.fit_dense
    monkeypatch.setattr(fit, "fit_dense", lambda a, b, sums: counts.append(sums.num_tokens) or real(a, b, sums))
    export_dense(trained.adapter, output=tmp_path / "out")
    assert counts == [40 * 20, 40 * 20, 40 * 8]


def test_modules_trained_whole_are_in_both_exports(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    keep_sample(trained.adapter)
    export_dense(trained.adapter, output=tmp_path / "dense")
    export_lora(trained.adapter, output=tmp_path / "lora")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    lora = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.base), str(tmp_path / "lora"))
    with torch.no_grad():
        logits = dense(input_ids=TOKENS).logits
        torch.testing.assert_close(lora(input_ids=TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    assert report_of(tmp_path / "dense")["merged"]["kl"] < report_of(tmp_path / "dense")["mean_gates"]["kl"]


@pytest.mark.slow
def test_ranks_that_share_the_tokens_find_what_one_process_finds(tmp_path: Path, kept: Trained) -> None:
    export_dense(kept.adapter, output=tmp_path / "one")
    arguments = ["launch/export.py", "--checkpoint", str(kept.adapter), "--mode", "dense", "--output"]
    printed = run_ranks([*arguments, str(tmp_path / "two")], world_size=2)
    assert "wrote" in printed[0] and "wrote" not in printed[1]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5)
    run_ranks([*arguments, str(tmp_path / "refined"), "--refine_steps", "20"], world_size=2)
    report = report_of(tmp_path / "refined")
    assert report["refine_kept"] and report["merged"]["kl"] < report["fitted"]["kl"]


def test_the_dtype_asked_for_is_written(tmp_path: Path, kept: Trained) -> None:
    export_dense(kept.adapter, output=tmp_path / "out", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


def test_a_divergence_above_the_bound_writes_nothing(tmp_path: Path, kept: Trained) -> None:
    with pytest.raises(ExportError, match=r"mean KL from the trained one is [\d.e-]+, above max_kl \(1e-06\)"):
        export_dense(kept.adapter, output=tmp_path / "out", fitting=Fitting(max_kl=1e-6))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", SAMPLE_NAME}


@pytest.mark.parametrize("export", [export_dense, export_lora])
def test_too_few_tokens_are_refused_with_how_many_are_needed(tmp_path: Path, trained: Trained, export: Any) -> None:
    keep_sample(trained.adapter, num_documents=3)
    message = (
        r"calibration holds 60 tokens, and the widest layer \(model.layers.0.mlp.down_proj, 48 in features\) needs 96"
    )
    with pytest.raises(ConfigError, match=message):
        export(trained.adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_tokens_nothing_can_be_fitted(tmp_path: Path, trained: Trained) -> None:
    with pytest.raises(ConfigError, match=r"calibration is not given, and .* keeps no calibration.safetensors; name"):
        export_dense(trained.adapter, output=tmp_path / "out")


def test_every_wrong_number_is_told_at_once(tmp_path: Path, kept: Trained) -> None:
    wrong = Fitting(calibration_tokens=0, refine_steps=-1, heldout_labels=-1, max_length=1, max_kl=0.0)
    with pytest.raises(ConfigError) as caught:
        export_dense(kept.adapter, output=tmp_path / "out", fitting=wrong)
    for name in (
        "calibration_tokens (0)",
        "refine_steps (-1)",
        "heldout_labels (-1)",
        "max_length (1)",
        "max_kl (0.0)",
    ):
        assert any(problem.startswith(name) for problem in caught.value.problems)


@pytest.mark.parametrize("named", [("calibration", "heldout"), ("calibration",), ("heldout",)])
def test_data_can_be_named_in_any_training_format(tmp_path: Path, trained: Trained, named: tuple[str, ...]) -> None:
    lines = [{"instruction": f"w{n} w{n + 1} w{n + 2}", "output": f"w{n + 3} w{n + 4}"} for n in range(3, 59)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("\n".join(map(json.dumps, lines[:4])))
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    tokenizer.eos_token, tokenizer.chat_template = "w2", None
    tokenizer.save_pretrained(trained.adapter)
    keep_sample(trained.adapter)
    sources = {"calibration": (str(data),), "heldout": (str(heldout),)}
    fitting = Fitting(fit=Fit.MEAN, **{name: sources[name] for name in named})
    export_lora(trained.adapter, output=tmp_path / "out", fitting=fitting)
    report = report_of(tmp_path / "out")
    kept = f"the checkpoint's {SAMPLE_NAME}"
    assert report["calibration"] == (str(data) if "calibration" in named else kept)
    assert report["heldout"] == (str(heldout) if "heldout" in named else f"a part of {data}")
    assert report["calibration_tokens"] > 0 and report["heldout_labels"] > 0


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, kept: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel refuses to let a file grow past the limit, as it does on a full disk.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ExportError, match=r"output \(.*out\) could not be written: .*File too large"):
            export_dense(kept.adapter, output=tmp_path / "out", fitting=Fitting(heldout_labels=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", SAMPLE_NAME}


@pytest.mark.parametrize("export", [export_dense, export_lora])
def test_a_base_with_other_weights_is_refused(tmp_path: Path, kept: Trained, export: Any) -> None:
    other = load_file(kept.base / "model.safetensors")
    other["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(other, kept.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"its weights are not those that .* was trained on"):
        export(kept.adapter, output=tmp_path / "out")


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, kept: Trained) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match=r"output \(.*\) exists already"):
        export_dense(kept.adapter, output=tmp_path / "out")


def test_a_lora_of_a_base_packed_with_the_residual_is_refused(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", residual="fold", **in_4bit())
    keep_sample(trained.adapter)
    with pytest.raises(
        ConfigError, match=r"merge_base \(dequant_w4\): residual fold was packed into the 4-bit weights"
    ):
        export_lora(trained.adapter, output=tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"residual": "fold"},
        {"adaptive_scale": True},
        {"init": "zero"},
        {"init": "pissa"},
        {"residual": "gated"},
        {"residual": "gated", "adaptive_scale": True, "shared_experts": 1},
        {"shared_experts": 2, "routing": "threshold"},
    ],
    ids=str,
)
def test_what_a_dense_finish_leaves_is_merged_without_loss(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained = train(tmp_path, "llama", finish=become_dense, **settings)
    export_dense(trained.adapter, output=tmp_path / "dense")
    export_lora(trained.adapter, output=tmp_path / "lora")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    lora = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.base), str(tmp_path / "lora"))
    for model in (dense, lora):
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=TOKENS).logits, trained.logits(), rtol=1e-4, atol=1e-4)
    assert report_of(tmp_path / "dense")["heldout"] is None


def test_a_dense_adapter_is_compared_where_there_are_tokens(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", finish=become_dense)
    keep_sample(trained.adapter)
    export_dense(trained.adapter, output=tmp_path / "out", fitting=Fitting(max_kl=1e-6))
    report = report_of(tmp_path / "out")
    assert report["merged"]["kl"] < 1e-6 and report["merged"]["agreement"] == 1
    assert report["fit"] is None and report["mean_gates"] is None and report["layers"] == []


def test_a_dense_adapter_has_nothing_to_fit(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", finish=become_dense)
    with pytest.raises(ConfigError) as caught:
        fitting = Fitting(fit=Fit.MEAN, calibration=("data.jsonl",), refine_steps=3)
        export_dense(trained.adapter, output=tmp_path / "out", fitting=fitting)
    assert [problem.partition(" has no effect")[0] for problem in caught.value.problems] == [
        "fit (mean)",
        "refine_steps (3)",
        "calibration (data.jsonl)",
    ]

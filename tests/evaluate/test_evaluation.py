"""One evaluation end to end, and every refusal together with the others, before a weight is read."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import OPTConfig

from goat_ds.errors import ConfigError
from goat_ds.evaluate import EvalSettings, evaluate
from goat_ds.evaluate.evaluation import read_records
from goat_ds.evaluate.subject import Subject
from goat_ds.export import export_exact
from tests.evaluate.conftest import LEARNED, alpaca, word_tokenizer
from tests.export.conftest import train

# transformers 5.23 deprecates what PEFT 0.21 asks every model for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Write = Callable[..., str]
ALL = ("perplexity", "exact_match", "choice_accuracy")


@pytest.fixture(autouse=True)
def no_weights_before_all_is_checked(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "refused" in request.node.name:
        monkeypatch.setattr(Subject, "load", lambda self: pytest.fail("weights were read"))


def settings(model: Path, *data: str, **more: Any) -> EvalSettings:
    return EvalSettings(model=str(model), data=data, **({"max_length": 64, "max_new_tokens": 8} | more))


def problems_of(wrong: EvalSettings) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        evaluate(wrong)
    return caught.value.problems


def test_a_model_that_has_learned_the_data_is_right_by_every_metric(
    knowing: Path, tmp_path: Path, write_data: Write
) -> None:
    records = [*alpaca(LEARNED), {"instruction": "w5", "output": ""}, {"text": "w5 w6"}]
    output = tmp_path / "report.json"
    report = evaluate(settings(knowing, write_data(records), metrics=ALL, output=output))
    report.write(output)
    assert report.exact_match == (1.0, 6, 6)
    assert report.choice_accuracy and report.choice_accuracy[:5] == (1.0, 1.0, 6, 6, 6)
    assert (report.num_records, report.dropped) == (7, {"empty answer": 1})
    written = json.loads(output.read_text())
    assert written["exact_match"] == {"accuracy": 1.0, "num_right": 6, "num_records": 6}
    assert written["perplexity"]["perplexity"] == pytest.approx(math.exp(written["perplexity"]["loss"]))
    assert (written["kind"], written["dtype"], written["tasks"]) == ("whole model", "float32", {})
    lines = str(report).splitlines()
    assert lines[0] == f"model: {knowing} (whole model, float32)"
    assert lines[1].endswith("data.jsonl: 7 records, 1 dropped: empty answer")
    assert "exact_match                   1.0000  6 of 6" in lines


def test_a_checkpoint_and_its_exact_export_get_the_same_report(tmp_path: Path, write_data: Write) -> None:
    trained = train(tmp_path, "llama")
    word_tokenizer().save_pretrained(trained.base)
    export_exact(trained.adapter, output=tmp_path / "exact")
    data = write_data(alpaca(LEARNED))
    reports = [
        evaluate(settings(path, data, metrics=ALL, trust_remote_code=path.name == "exact"))
        for path in (trained.adapter, tmp_path / "exact")
    ]
    checkpoint, exact = (report.to_dict() for report in reports)
    assert (checkpoint["kind"], exact["kind"]) == ("GOAT adapter", "exact export")
    for name in ALL:
        assert checkpoint[name] == exact[name] is not None
    of_base = evaluate(settings(trained.base, data)).to_dict()
    assert of_base["perplexity"]["loss"] != checkpoint["perplexity"]["loss"]
    assert f"(GOAT adapter on {trained.base}, float32)" in str(reports[0])


def test_choices_alone_are_reason_enough_for_choice_accuracy(knowing: Path, write_data: Write) -> None:
    report = evaluate(settings(knowing, write_data(alpaca({"w5": "w20"})), choices=("w20", "w26")))
    assert report.perplexity and report.exact_match and report.choice_accuracy
    assert report.choice_accuracy.choices == ["w20", "w26"]
    assert evaluate(settings(knowing, write_data(alpaca({"w5": "w20"})))).choice_accuracy is None


def test_the_limit_counts_records_and_not_what_is_dropped(knowing: Path, write_data: Write) -> None:
    records = [{"instruction": "w5", "output": ""}, *alpaca(LEARNED)]
    limited = settings(knowing, write_data(records), limit=2)
    assert len(read_records(limited)) == 3
    report = evaluate(limited)
    assert report.exact_match == (1.0, 2, 2)
    assert (report.num_records, report.dropped) == (2, {"empty answer": 1})


def test_everything_that_is_wrong_is_refused_at_once(tmp_path: Path, write_data: Write) -> None:
    (tmp_path / "report.json").write_text("{}")
    wrong = settings(
        tmp_path / "nowhere",
        write_data([{"question": "w5"}]),
        str(tmp_path / "missing.jsonl"),
        metrics=("perplexity", "bleu"),
        choices=("yes", "yes "),
        include_path=tmp_path / "no-tasks",
        apply_chat_template=True,
        batch_size=0,
        max_new_tokens=0,
        limit=0,
        max_length=1,
        output=tmp_path / "report.json",
    )
    told = "\n".join(problems_of(wrong))
    for words in (
        "metrics (bleu) must be of perplexity, exact_match, choice_accuracy",
        "choices has no effect without data and the metric choice_accuracy",
        "include_path (",
        "has no effect without tasks; give --tasks NAME, or leave it out",
        "no-tasks) is no folder",
        "apply_chat_template has no effect without tasks",
        "batch_size (0) must be at least 1",
        "max_new_tokens (0) must be at least 1",
        "limit (0) must be at least 1",
        "max_length (1) must be at least 2",
        "choices (yes, yes ) must be at least two different texts, none of them empty",
        "report.json) exists already; name a new file, nothing is overwritten",
        "nowhere) cannot be loaded",
        "data.jsonl line 1: neither",
        'it has "question"',
        "missing.jsonl: no such file or folder",
    ):
        assert words in told
    assert (tmp_path / "report.json").read_text() == "{}"


def test_neither_data_nor_tasks_is_refused(knowing: Path) -> None:
    words = "data and tasks are both missing; give --data FILE to measure on, or --tasks NAME, or both"
    assert problems_of(settings(knowing)) == (words,)


def test_metrics_without_data_are_refused(knowing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("goat_ds.evaluate.harness.find_spec", lambda name: None)
    useless, missing = problems_of(settings(knowing, tasks=("arc_easy",), metrics=("perplexity",)))
    assert useless == "metrics (perplexity) has no effect without data; give --data FILE, or leave it out"
    assert missing.startswith("tasks (arc_easy) need lm-evaluation-harness, which is not installed")


def test_an_output_without_a_folder_is_refused(knowing: Path, tmp_path: Path, write_data: Write) -> None:
    (problem,) = problems_of(settings(knowing, write_data(alpaca(LEARNED)), output=tmp_path / "no" / "report.json"))
    assert (
        problem == f"output ({tmp_path / 'no' / 'report.json'}) would be in a folder that does not exist; make it first"
    )


def test_answers_in_texts_are_refused(knowing: Path, write_data: Write) -> None:
    (problem,) = problems_of(settings(knowing, write_data([{"text": "w5 w6"}])))
    assert problem == "exact_match and choice_accuracy need answers, and data holds texts; use --metrics perplexity"


def test_what_the_model_has_no_positions_for_is_refused_with_its_place(knowing: Path, write_data: Write) -> None:
    data = write_data(alpaca({"w5": "w20", "w6 " * 60: "w21"}))
    told = problems_of(settings(knowing, data, metrics=ALL, max_length=65, max_new_tokens=10))
    assert told == (
        "max_length (65) is above the model's max_position_embeddings (64); lower it",
        f"{data} line 2: exact_match takes 72 positions here, and the model's max_position_embeddings is 64; leave the "
        "record out, or lower max_new_tokens",
    )
    data = write_data(alpaca({"w6 " * 61: "w21"}))
    (problem,) = problems_of(settings(knowing, data, metrics=ALL[2:], choices=("w21", "w22 w23")))
    assert problem == (
        f"{data} line 1: choice_accuracy takes 66 positions here, and the model's max_position_embeddings is 64; leave "
        "the record out"
    )


def test_an_architecture_that_mixes_records_is_refused_for_the_metrics_that_pack(
    tmp_path: Path, write_data: Write
) -> None:
    folder = tmp_path / "opt"
    OPTConfig(vocab_size=64, max_position_embeddings=64).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    told = problems_of(settings(folder, write_data(alpaca(LEARNED)), metrics=ALL))
    assert told[0].startswith(f"perplexity and choice_accuracy: model ({folder}): the opt architecture does not keep")
    assert told[0].endswith("; leave them out with --metrics")

"""Every kind of file gives the same records, and every mistake its place."""

import json

import pytest
from datasets import Dataset, DatasetDict
from datasets.utils.logging import disable_progress_bar

from goat_ds.data.formats import DataFormat, Dropped
from goat_ds.data.sources import check_sources, digest_of, load_records
from goat_ds.errors import ConfigError

RECORDS = [{"instruction": "why", "input": "", "output": f"so {i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def quiet():
    disable_progress_bar()


def answers(*sources, **how):
    return [record.messages[-1]["content"] for record in load_records(sources, **how)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def as_csv(path):
    return write(path, "instruction,input,output\n" + "".join(f"why,,so {i}\n" for i in range(5)))


def as_parquet(path):
    Dataset.from_list(RECORDS).to_parquet(path)
    return str(path)


def as_saved(path):
    DatasetDict(train=Dataset.from_list(RECORDS), test=Dataset.from_list(RECORDS[:1])).save_to_disk(path)
    return str(path)


WRITERS = {
    "a.jsonl": lambda path: write(path, "\n\n".join(map(json.dumps, RECORDS))),
    "a.json": lambda path: write(path, json.dumps(RECORDS, indent=2)),
    "lines.json": lambda path: write(path, "\n".join(map(json.dumps, RECORDS))),
    "a.csv": as_csv,
    "a.parquet": as_parquet,
    "saved": as_saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_records_are_read_from_every_kind_of_file(tmp_path, name):
    source = WRITERS[name](tmp_path / name)
    assert answers(source) == [record["output"] for record in RECORDS]
    assert check_sources([source]) == []


def test_sources_of_different_formats_follow_each_other(tmp_path):
    first = write(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}\n{"messages": []}\n')
    second = as_csv(tmp_path / "b.csv")
    records = list(load_records([first, second]))
    assert [type(record) is Dropped for record in records] == [False, True] + [False] * 5
    assert [record.origin for record in records[:3]] == [f"{first} line 1", f"{first} line 2", f"{second} line 2"]


def test_csv_cells_stay_text_and_keep_their_line(tmp_path):
    source = write(tmp_path / "a.csv", 'prompt,completion\n"x\ny",None\nz,007\n')
    records = list(load_records([source]))
    assert [record.messages[-1]["content"] for record in records] == ["None", "007"]
    assert [record.origin for record in records] == [f"{source} line 2", f"{source} line 4"]


def test_a_folder_is_split_by_its_file_names(tmp_path):
    write(tmp_path / "train.jsonl", '{"prompt": "a", "completion": "b"}\n')
    write(tmp_path / "test.json", '[{"prompt": "a", "completion": "c"}]')
    write(tmp_path / "README.md", "train")
    assert (answers(str(tmp_path)), answers(str(tmp_path), split="test")) == (["b"], ["c"])
    assert 'no split "validation", its files are train, test' in check_sources([str(tmp_path)], split="validation")[0]


def test_a_folder_without_split_names_is_read_in_the_order_of_its_names(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"prompt": "q", "completion": name}))
    assert answers(str(tmp_path)) == ["a", "b", "c"]


def test_a_saved_data_set_gives_the_split_that_is_asked_for(tmp_path):
    source = as_saved(tmp_path / "saved")
    assert answers(source, split="test") == ["so 0"]
    assert check_sources([source], split="dev") == [f'{source}: no split "dev", it has train, test']


def test_a_hub_name_goes_to_the_hub_with_its_config_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "goat_ds.data.sources.load_dataset",
        lambda name, config, split: asked.append((name, config, split)) or Dataset.from_list(RECORDS),
    )
    assert len(answers("owner/name:config", split="test")) == 5
    assert asked == [("owner/name", "config", "test")]


def test_what_the_hub_refuses_is_a_problem_of_the_source(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("goat_ds.data.sources.load_dataset", refuse)
    assert check_sources(["owner/name"]) == [
        "owner/name: no file or folder here, and not to be had from the hub: no network"
    ]


BAD_FILES = {
    "bad.jsonl": ('{"text": "a"}\n{"text": \n', r"bad.jsonl line 2: bad JSON: Expecting value"),
    "unknown.jsonl": ('{"text": "a"}\n{"q": "a"}\n', r'unknown.jsonl line 2: neither .* it has "q"'),
    "bad.json": ('[\n{"text": "a"},\n{"text" "b"}]', r"bad.json line 3: bad JSON: Expecting ':'"),
    "comma.json": ('[\n{"text": "a"}\n{"text": "b"}]', r"comma.json line 3: bad JSON: no comma"),
    "open.json": ('[\n{"text": "a"}\n', r"open.json line 3: bad JSON: the list must end"),
    "scalar.json": ("[1]", r"scalar.json line 1: a record must be an object .* not a number"),
    "bad.csv": ("prompt,completion\na,b,c\n", r"bad.csv line 2: more cells than the header names"),
    "short.csv": ("question,completion\na,b\n", r"short.csv line 2: neither"),
    "bad.parquet": ("PAR?", r"bad.parquet: bad Parquet"),
    "empty.jsonl": ("\n", r"empty.jsonl: an empty data set"),
    "empty.json": ("[]", r"empty.json: an empty data set"),
    "empty.csv": ("prompt,completion\n", r"empty.csv: an empty data set"),
    "notes.txt": ("text", r"notes.txt: cannot read .txt, only .json, .jsonl, .csv, .parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_told_with_name_and_line(tmp_path, name):
    text, words = BAD_FILES[name]
    source = write(tmp_path / name, text)
    with pytest.raises(ConfigError, match=words):
        list(load_records([source]))


def test_bytes_that_are_not_utf8_are_told_with_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "a.jsonl line 2: not UTF-8" in check_sources([str(tmp_path / "a.jsonl")])[0]


def test_the_problems_of_all_sources_come_at_once(tmp_path):
    sources = [str(tmp_path / "missing.jsonl"), *(write(tmp_path / name, BAD_FILES[name][0]) for name in BAD_FILES)]
    with pytest.raises(ConfigError) as raised:
        list(load_records(sources))
    assert len(raised.value.problems) == len(sources)
    assert raised.value.problems[0] == f"{sources[0]}: no such file or folder"
    assert list(raised.value.problems) == check_sources(sources)


def test_a_named_format_holds_for_every_record(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    assert check_sources([source], data_format=DataFormat.ALPACA) == [f'{source} line 1: no "instruction"']


def test_the_digest_follows_the_content(tmp_path):
    source = WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    before = digest_of([source])
    assert digest_of([source]) == before
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    assert digest_of([source]) != before
    with pytest.raises(ConfigError, match="no such file"):
        digest_of(["missing.json"])


def test_a_file_that_cannot_be_read_is_told_with_the_others(tmp_path, monkeypatch):
    first, second = (write(tmp_path / name, '{"text": "a"}\n') for name in ("a.jsonl", "b.jsonl"))

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(ConfigError) as raised:
        digest_of([first, second], digest_file=refuse)
    assert raised.value.problems == tuple(f"{source}: cannot be read: Permission denied" for source in (first, second))

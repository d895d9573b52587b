"""What was tokenised once is found again, unless anything that matters has changed or it is damaged."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from goat_ds.data import cache
from goat_ds.data.cache import prepare
from goat_ds.errors import ConfigError

from .conftest import CHATML, byte_bpe

RECORDS = [{"prompt": f"the cat {i}", "completion": "sat on the mat"} for i in range(20)]


@pytest.fixture
def tokenised(monkeypatch):
    """Count how often the work is really done."""
    calls = []

    def counting(*arguments, **named):
        calls.append(1)
        return real(*arguments, **named)

    real = cache.tokenise
    monkeypatch.setattr(cache, "tokenise", counting)
    return calls


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != cache.KNOWN_FILES)


def test_the_second_time_nothing_is_tokenised_and_everything_is_the_same(tokenizer, tmp_path, write_jsonl, tokenised):
    source = write_jsonl(RECORDS)
    first, second = (prepare([source], tokenizer, max_length=256, cache_dir=tmp_path / "cache") for _ in range(2))
    assert len(tokenised) == 1
    assert first.report == second.report and first.dataset[:] == second.dataset[:]
    assert first.dataset.cache_files == second.dataset.cache_files


def test_whatever_changes_the_tokens_makes_another_entry(bpe, tmp_path, write_jsonl, tokenised):
    how = {"max_length": 256, "cache_dir": tmp_path / "cache"}
    source = write_jsonl(RECORDS)
    prepare([source], bpe, **how)
    prepare([source], bpe, **{**how, "max_length": 255})
    prepare([source, source], bpe, **how)
    bpe.chat_template = CHATML
    prepare([source], bpe, **how)
    bpe.add_tokens("cat")
    prepare([source], bpe, **how)
    write_jsonl(RECORDS[1:])
    prepare([source], bpe, **how)
    assert len(tokenised) == len(entries(tmp_path / "cache")) == 6


@pytest.mark.parametrize("file", ["tokens.arrow", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_entry_is_made_again(bpe, tmp_path, write_jsonl, tokenised, file, damage):
    source = write_jsonl(RECORDS)
    whole = prepare([source], bpe, max_length=256, cache_dir=tmp_path / "cache").dataset[:]
    damaged = entries(tmp_path / "cache")[0] / file
    content = damaged.read_bytes()
    damaged.unlink()
    if damage != "missing":
        damaged.write_bytes(content[:-9] if damage == "truncated" else content.replace(b"sha", b"SHA")[:-1] + b"?")
    assert prepare([source], bpe, max_length=256, cache_dir=tmp_path / "cache").dataset[:] == whole
    assert len(tokenised) == 2 and len(entries(tmp_path / "cache")) == 1


def test_a_mistake_leaves_nothing_behind(bpe, tmp_path, write_jsonl):
    source = write_jsonl([*RECORDS, {"cat": 1}])
    with pytest.raises(ConfigError, match="line 21: neither"):
        prepare([source], bpe, max_length=256, cache_dir=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_those_who_race_end_with_one_entry(tmp_path, write_jsonl):
    source, folder = write_jsonl(RECORDS * 20), tmp_path / "cache"
    tokenizers = [byte_bpe() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(
            pool.map(lambda tokenizer: prepare([source], tokenizer, max_length=256, cache_dir=folder), tokenizers)
        )
    assert all(each.report == made[0].report and each.dataset[:] == made[0].dataset[:] for each in made)
    assert len(entries(folder)) == 1


def test_losing_the_race_takes_what_the_winner_left(bpe, tmp_path, write_jsonl, monkeypatch):
    source, folder = write_jsonl(RECORDS), tmp_path / "cache"

    def overtaken(*arguments, **named):
        monkeypatch.undo()
        prepare([source], bpe, max_length=256, cache_dir=folder)
        return real(*arguments, **named)

    real = cache.tokenise
    monkeypatch.setattr(cache, "tokenise", overtaken)
    assert len(prepare([source], bpe, max_length=256, cache_dir=folder).dataset) == 20
    assert len(entries(folder)) == 1

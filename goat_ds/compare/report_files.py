"""What a comparison leaves beside results.jsonl: table.md, summary.json and compare.html, each written whole."""

import json
from pathlib import Path

from goat_ds.compare.search import Search
from goat_ds.compare.standings import Standings
from goat_ds.compare.table import as_markdown, as_summary
from goat_ds.compare.web_page import page_of


def write_reports(search: Search, found: Standings, folder: Path) -> list[Path]:
    """Write the reports of a comparison, and return their paths."""
    texts = {
        "table.md": as_markdown(found),
        "summary.json": json.dumps(as_summary(found), indent=2) + "\n",
        "compare.html": page_of(search, found),
    }
    for name, text in texts.items():
        # A reader, or a browser, must not find half of it.
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    return [folder / name for name in texts]

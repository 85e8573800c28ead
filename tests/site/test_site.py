"""`make site`: mkdocs finds no broken link, and no page of the site asks another server for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.conftest import Browser, browser

__all__ = ["browser"]

pytest.importorskip("material", reason="the site needs mkdocs-material: pip install -c constraints.txt '.[docs]'")

ROOT = Path(__file__).parents[2]
# what a browser fetches by itself: not links, which a reader may follow
FETCHED = r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    built = {p.relative_to(site).with_suffix(".md").as_posix() for p in site.rglob("*.html")}
    pages = {p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")) if p.name != "README.md"}
    assert pages <= built and "index.md" in built and "launch/index.md" in built


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert re.findall(FETCHED, page.read_text(encoding="utf-8")) == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")) == [], sheet


def test_links_to_canonical_addresses_are_not_taken_for_fetches() -> None:
    assert re.findall(FETCHED, '<a href="https://example.org">a</a>') == []
    assert re.findall(FETCHED, '<script async src="https://example.org/a.js">') == ["https://example.org/a.js"]


def test_readme_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)", readme))
    assert {p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md")} - linked == set()


def test_a_page_from_a_disk_can_be_searched(site: Path, browser: Browser) -> None:
    """A browser starts no worker from a file, so docs/assets/iframe-worker.js must stand for one."""
    page = browser.run(site / "docs/how-to/own-data.html", "--virtual-time-budget=20000", "--dump-dom", query="?q=recompute")
    assert re.search(r"md-search-result__meta\">\s*\d+ matching documents", page), "no result"

"""`toolkit report`: what goes in, what it refuses, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.profile.conftest import Profiled, toolkit
from toolkit.errors import DataError
from toolkit.report.page import page
from toolkit.runfolder.read import read_runs

GOOD = '{"step": 1, "loss": 5.0, "tokens_per_s": 10.0}\n{"step": 2, "loss": 4.5, "tokens_per_s": 12.0}\n'


class Balanced(HTMLParser):
    """Every element that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "line", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "line":
            return
        assert self.open and self.open.pop() == tag, tag


def _run(folder: Path, name: str, text: str = GOOD) -> Path:
    run = folder / name
    run.mkdir()
    (run / "metrics.jsonl").write_text(text)
    return run


def test_the_command_writes_one_file_that_shows_all(profiled: Profiled, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    done = toolkit("report", str(profiled.folder), str(plan), str(_run(tmp_path, "other")), "-o", str(out))
    assert done.returncode == 0 and str(out) in done.stdout, done.stdout
    text = out.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == [] and {"svg", "table", "script", "style"} <= parser.tags
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    for words in ("Predicted against measured", "Pipeline schedule", "small", "other", "ZeRO-2", "no profile.json"):
        assert words in text, words
    assert "src=" not in text and "<link" not in text and "@import" not in text


def test_expected_and_measured_stand_side_by_side(profiled: Profiled, tmp_path: Path) -> None:
    """In the page, and as JSON with the intervals that profile.json holds."""
    other = _run(tmp_path, "other", '{"step": 1, "loss": 5.0, "tokens_per_s": 10.0, "step_s": 2.0}\n')
    done = toolkit("report", str(profiled.folder), str(other), "-o", str(tmp_path / "report.html"), "--json")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)["runs"]
    told = json.loads((profiled.folder / "profile.json").read_text())["predicted"]["range"]
    step = next(f for f in found["small"]["expected"] if f["of"] == "profile" and f["figure"] == "step")
    assert step["range"] == pytest.approx(told["step_s"]) and step["measured"] > 0
    assert found["other"]["expected"] == [] and "config" in found["other"]["unknown"][0]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Expected against measured" in text and "80 % interval" in text and "measured lies" in profiled.said


def test_everything_from_outside_is_escaped(plan: Path, tmp_path: Path) -> None:
    evil = tmp_path / "<script>alert(1)</script>"
    evil.mkdir(parents=True)
    (evil / "metrics.jsonl").write_text(GOOD)
    (evil / "config.yaml").write_text("model: {preset: '\"><img src=x onerror=alert(1)>'}\n")
    text = page(read_runs([evil, plan]))
    parser = Balanced()
    parser.feed(text)
    assert parser.open == [] and "img" not in parser.tags
    assert text.count("<script>") == 1 and "&lt;b&gt;slower&lt;/b&gt;" in text and "h100 &amp; &lt;80gb&gt;" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": 1, "loss": 5.0}\n{"step": 2, "lo\n{"step": 3}\n', "line 2"),
        ('{"step": 1}\n[1, 2]\n{"step": 3}\n', "line 2"),
        ('{"loss": 1}\n{"step": 3}\n', "line 1.*has no step"),
        ('{"step": true}\n\n', "line 1"),
        ('{"step": 1, "loss": NaN}\n\n', "line 1.*loss is nan"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=f"metrics.jsonl, {words}"):
        read_runs([_run(tmp_path, "run", text)])


def test_what_a_killed_run_leaves_is_passed_over_and_said(tmp_path: Path) -> None:
    (run,) = read_runs([_run(tmp_path, "run", GOOD + '{"step": 3, "lo')])
    assert [r["step"] for r in run.metrics] == [1, 2] and "line 3" in run.notes[0]
    assert "line 3 of metrics.jsonl is cut off" in page([run])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tune.json", "{", "tune.json is damaged"),
        ("tune.json", '{"format": 7, "plans": []}', "format 1"),
        ("tune.json", '{"format": 1, "plans": [{"layout": {}}]}', "plan 1, lacks tokens_per_s"),
        ("profile.json", "[]", "format None"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
    ],
)
def test_other_damaged_files_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    run = _run(tmp_path, "run")
    (run / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_runs([run])


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        ((str(tmp_path / "nowhere"),), "does not exist"),
        ((str(empty),), "holds no metrics.jsonl, profile.json or tune.json"),
        ((str(_run(tmp_path, "run")), "-o", str(tmp_path)), "cannot be written"),
    ):
        done = toolkit("report", *arguments)
        assert done.returncode == 2 and words in done.stdout and "Traceback" not in done.stdout, done.stdout
        assert done.stdout.count("error:") == 1


def test_extremes_of_a_run_are_drawn(tmp_path: Path) -> None:
    one = _run(tmp_path, "one", '{"step": 7, "loss": null, "grad_norm": null, "lr": 0.0, "tokens_per_s": 0, "skipped": true}\n')
    many = "".join(json.dumps({"step": i, "loss": 1e9 / i, "lr": 1e-30, "memory_gib": 0.0}) + "\n" for i in range(1, 5000))
    text = page(read_runs([one, _run(tmp_path, "many", many)]))
    assert "nan" not in text.lower().replace("nano", "") and len(text) < 400_000


def test_a_report_needs_no_torch() -> None:
    code = "import sys, toolkit.report.page, toolkit.report.commands, toolkit.runfolder.read\nprint(sorted({'torch', 'deepspeed', 'megatron'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

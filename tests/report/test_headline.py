"""The verdict and the tiles at the head of a report, from steps that are written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.profile.conftest import Profiled
from toolkit.report.headline import figures, headline, verdict
from toolkit.runfolder.read import RunFolder, read_runs


def run(folder: Path, losses: Sequence[float | None], *, steps: int | None = None, **figures: Any) -> RunFolder:
    folder.mkdir(exist_ok=True)
    records = [{"step": i, "loss": loss, "step_s": 2.0, "tokens_per_s": 500.0} | figures for i, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if steps is not None:
        (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
    return read_runs([folder])[0]


@pytest.mark.parametrize(
    ("losses", "steps", "said"),
    [
        ([5.0, 4.0, 3.0], 3, ["Finished: all 3 steps.", "The loss fell from 5.0000 to 3.0000."]),
        ([5.0, 4.0], 10, ["Not finished: step 2 of 10; starting it again goes on.", "The loss fell from 5.0000 to 4.0000."]),
        ([5.0, 2.0, 4.0], 3, ["Finished: all 3 steps.", "The loss rose again: 2.0000 at its lowest, 4.0000 at the end."]),
        ([5.0, 2.0, 2.05], 3, ["Finished: all 3 steps.", "The loss fell from 5.0000 to 2.0500."]),
        ([3.0, 4.0, 5.0], 3, ["Finished: all 3 steps.", "The loss did not fall: 3.0000 at first, 5.0000 at the end."]),
        ([5.0], None, ["1 steps were taken."]),
    ],
)
def test_the_verdict_says_how_it_ended(tmp_path: Path, losses: list[float], steps: int | None, said: list[str]) -> None:
    assert verdict(run(tmp_path / "run", losses, steps=steps)) == said


def test_a_single_bad_batch_at_the_end_is_not_a_rise(tmp_path: Path) -> None:
    losses = [5.0 - 0.02 * i for i in range(100)] + [4.0]
    assert verdict(run(tmp_path / "run", losses))[1] == "The loss fell from 5.0000 to 4.0000."


def test_what_held_it_up_is_named(tmp_path: Path) -> None:
    waited = run(tmp_path / "run", [5.0, None, 4.0], data_wait_s=0.5, skipped=True)
    assert verdict(waited)[2:] == [
        "3 of 3 steps were skipped, their loss or gradient not being finite.",
        "A step waits for data 25% of its time: raise data.workers.",
    ]
    assert len(verdict(run(tmp_path / "other", [5.0, 4.0], data_wait_s=0.05))) == 2


def test_the_tiles_leave_out_what_is_not_known(tmp_path: Path) -> None:
    shown = dict(figures(run(tmp_path / "run", [5.0, 4.0], mfu=None, memory_gib=1.5)))
    assert shown == {
        "steps": "2",
        "loss": "4.0000",
        "tokens/s": "500",
        "memory of the worst rank": "1.50 GiB",
        "time in steps": shown["time in steps"],
    }
    assert "4" in shown["time in steps"]


def test_a_profiled_step_says_where_it_goes(profiled: Profiled) -> None:
    seen = read_runs([profiled.folder])[0]
    assert seen.profile is not None
    slow = json.loads(json.dumps(seen.profile))
    for rank in slow["ranks"]:
        rank["seconds"]["step"] = 5 * slow["predicted"]["seconds"]["step"]
    said = verdict(RunFolder(name="slow", path=seen.path, profile=slow))
    assert said[-1].startswith("Most of a profiled step goes to ") and said[-1].endswith("It took 5.0 times as long as predicted.")
    assert "tile" in headline(seen) and "verdict" in headline(seen)


def test_a_ranking_has_no_headline(plan: Path) -> None:
    assert headline(read_runs([plan])[0]) == ""

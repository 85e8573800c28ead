"""`toolkit profile` as a user runs it: what it measures, what it leaves alone, and what it says
when memory ends.
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace

import pytest

from tests.cost.machines import made_up
from tests.profile.conftest import Profiled, toolkit
from toolkit.config.load import parse_config
from toolkit.cost.cpu_step import cpu_step_time
from toolkit.cost.step import step_time
from toolkit.cost.workload import Workload
from toolkit.errors import DataError
from toolkit.evidence.runs import calibrate, read_run
from toolkit.hardware.catalogue import parse_hardware
from toolkit.profile.show import difference
from toolkit.runfolder.profile import read_profile, write_profile


def test_memory_is_measured_as_estimated(profiled: Profiled) -> None:
    found = read_profile(profiled.folder)
    assert found is not None and [r["rank"] for r in found["ranks"]] == [0, 1] and [r["stage"] for r in found["ranks"]] == [0, 1]
    for rank in found["ranks"]:
        for part in ("parameters", "gradients", "optimizer", "activations"):
            off = difference(rank["predicted"][part], rank["memory"][part])
            assert off is not None and abs(off) < 0.02, (rank["rank"], part)
        assert rank["memory"]["peak"] >= max(n for _, n in rank["memory_over_time"]) > 0
        assert rank["memory"]["peak"] < rank["rss"]
    assert found["ranks"][0]["memory"]["logits"] == 0 < found["ranks"][1]["memory"]["logits"]


def test_seconds_count_once_and_bytes_are_those_of_the_layout(profiled: Profiled) -> None:
    found = read_profile(profiled.folder)
    assert found is not None
    for rank in found["ranks"]:
        seconds = rank["seconds"]
        assert sum(v for k, v in seconds.items() if k != "step") == pytest.approx(seconds["step"], rel=0.05)
        assert min(seconds["forward"], seconds["backward"], seconds["optimizer"], seconds["communication"]) > 0
        traffic = {(row["group"], row["operation"]): row for row in rank["traffic"]}
        for operation in ("send", "recv"):  # [s, b, h] of fp32 for each of four micro-batches: one goes, its gradient comes
            row = traffic["pipeline", operation]
            assert row["calls"] == 4 and row["nbytes"] == 4 * 32 * 2 * 32 * 4


def test_traces_open_and_show_the_passes(profiled: Profiled) -> None:
    found = read_profile(profiled.folder)
    assert found is not None
    for rank in found["ranks"]:
        with gzip.open(profiled.folder / rank["trace"], "rt") as file:
            events = json.load(file)["traceEvents"]
        names = [e.get("name") for e in events if e.get("ph") == "X"]
        assert names.count("forward") >= 4 and names.count("backward") >= 4


def test_tables_stand_side_by_side(profiled: Profiled) -> None:
    for text in ("memory of rank 0 (stage 0)", "memory of rank 1 (stage 1)", "predicted", "measured", "difference", "pipeline", "wrote "):
        assert text in profiled.said
    assert "Traceback" not in profiled.said


def test_training_files_are_left_alone(profiled: Profiled) -> None:
    assert (profiled.folder / "metrics.jsonl").read_text() == profiled.metrics
    assert not list((profiled.folder / "profile").rglob("*.distcp")) and not (profiled.folder / "profile" / "checkpoints").exists()


def test_the_end_of_memory_is_named_and_the_advice_fits(profiled: Profiled) -> None:
    """A real limit on the ranks' address space; following the advice, the same run ends well under
    the same limit.
    """
    keys = ["train.seq_length=2048", "train.micro_batch_size=8", "model.vocab_size=8192", "parallel.pp=1"]
    keys.append(f"run.dir={profiled.folder.parent / 'full'}")
    command = ["profile", str(profiled.config), *keys, "--num-procs", "1", "--steps", "1", "--memory-limit", "0.6"]
    done = toolkit(*command)
    assert done.returncode == 4 and "Traceback" not in done.stdout, done.stdout
    said = re.search(r"error: rank 0 \(stage 0(, layer \d)?\) ran out of memory for [a-z ]+ asking for .*", done.stdout)
    assert said, done.stdout
    advice = re.findall(r"(?:Set | and )(\w+\.\w+=\w+)", said[0])
    assert advice, said[0]
    again = toolkit(*command, *advice)
    assert again.returncode == 0, again.stdout


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--steps", "0"), "--steps 0"),
        (("--memory-limit", "-1"), "--memory-limit -1"),
        (("--calibration", "nowhere.yaml"), "calibration file 'nowhere.yaml' cannot be read"),
    ],
)
def test_wrong_options_are_refused(profiled: Profiled, option: tuple[str, str], words: str) -> None:
    done = toolkit("profile", str(profiled.config), *option)
    assert done.returncode == 2 and words in done.stdout and "Traceback" not in done.stdout


def test_a_damaged_profile_is_named(tmp_path: object, profiled: Profiled) -> None:
    folder = profiled.folder.parent / "damaged"
    found = read_profile(profiled.folder)
    assert found is not None and read_profile(folder) is None
    path = write_profile(folder, found)
    whole = path.read_text()
    rankless = whole.replace('"rss"', '"gone"')
    for text, words in (
        (whole[:-20], "is damaged"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "config": {"a": 1}}', "lacks layout"),
        (rankless, "lacks rss of a rank"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_profile(folder)


def test_the_estimate_is_of_the_calibration_that_was_given(profiled: Profiled) -> None:
    """A made-up machine's, whose steps nobody else would expect; the file holds four digits."""
    found = read_profile(profiled.folder)
    assert found is not None
    w = Workload.of(parse_config(found["config"]), 2)
    expected = cpu_step_time(w, replace(parse_hardware("cpu:2"), cpu=made_up())).step
    assert found["predicted"]["seconds"]["step"] == pytest.approx(expected, rel=1e-3) != step_time(w, parse_hardware("cpu:2")).step


def test_the_planner_can_be_calibrated_to_a_profile(profiled: Profiled) -> None:
    run = read_run(profiled.folder)
    (entry,) = calibrate([run])
    assert (run.workload.pp, run.workload.world, run.hardware.gpu.name, run.steps) == (2, 2, "cpu", 2)
    assert entry["sources"] == [str(profiled.folder)] and abs(entry["bias_left"][str(profiled.folder)]) < 0.02

"""A run that gets stuck, or whose machines compute wrongly, ends and says where."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

from tests.train.conftest import Started
from tests.trainer.conftest import Fitted
from toolkit.cluster.launch import local_command
from toolkit.cluster.stalls import REQUEUE, STALLED, read_reports
from toolkit.runfolder.files import CONSOLE, RANKS

SCRIPT = """
from tests.trainer.parts import StuckOnRank1, stuck_from_step_2
from toolkit import Trainer

Trainer({config!r}, dataset=StuckOnRank1(), on_step=stuck_from_step_2).fit()
"""


def test_a_stuck_reader_is_named_with_what_the_others_wait_in(fitted: Fitted, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(config=fitted.config(train={"watchdog_s": 5})))
    command = local_command("", num_procs=2)
    done = Started(tmp_path, script).run([*command[: command.index("--module")], str(script)], timeout_s=180)
    assert done.code == REQUEUE, done.output
    said = re.findall(r"no progress for 5 s in step 3: (.*)", done.output)
    assert len(said) == 1, done.output
    assert re.fullmatch(r"rank 0 waits in all-reduce \d+ of the data group on \S+, rank 1 is in its data loader on \S+", said[0]), said
    (folder,) = (tmp_path / "run" / STALLED).iterdir()
    reports = read_reports(folder)
    assert [reports[rank].kind for rank in (0, 1)] == ["collective", "data"]
    stacks = [(folder / f"rank-{rank:05}.txt").read_text() for rank in (0, 1)]
    assert "all_reduce" in stacks[0] and "StuckOnRank1" not in stacks[0]
    assert re.search(r"parts\.py\", line \d+ in __getitem__", stacks[1])


def test_a_flipped_bit_is_found_and_its_rank_named(fitted: Fitted) -> None:
    config = fitted.config(train={"check_replicas_every": 1})
    ranks = fitted({"config": config, "dataset": ["Numbers"], "on_step": "flips_a_bit_on_rank_2"}, ranks=4)
    (error,) = {rank["errors"][0] for rank in ranks}
    assert re.match(r"TrainingError: step 3: the weights of rank 2 \(\S+\) differ from the other replicas", error), error


def test_a_loss_that_does_not_repeat_names_its_replica(fitted: Fitted) -> None:
    config = fitted.config(train={"check_repeat_every": 2})
    error = fitted.error(config=config, loss="computes_wrong_on_rank_1")
    assert re.match(r"TrainingError: step 2: the same micro-batches have given rank 1 \(\S+\) two different losses", error), error


def test_sound_machines_pass_both_checks(fitted: Fitted) -> None:
    checked = fitted.config("checked", train={"check_repeat_every": 1, "check_replicas_every": 1})
    ranks = fitted({"config": fitted.config(), "dataset": ["Numbers"]}, {"config": checked, "dataset": ["Numbers"]})
    assert ranks[0]["errors"] == [None, None] and fitted.losses() == fitted.losses("checked")


def test_replicas_are_not_compared_where_there_are_none(fitted: Fitted) -> None:
    config = fitted.config(zero={"stage": 3}, train={"check_replicas_every": 1})
    assert "train.check_replicas_every=1 with zero.stage=3" in fitted.error(config=config)


def test_the_slowest_rank_is_named(fitted: Fitted) -> None:
    config = fitted.config(train={"steps": 22, "global_batch_size": 2})
    fitted({"config": config, "dataset": ["Numbers"], "on_step": "is_slow_on_rank_1"})
    own = [rank["own_s"] for rank in json.loads((fitted.folder / "run" / RANKS).read_text())["ranks"]]
    assert own[1] > own[0]
    (said,) = re.findall(r"slowest: (rank \d on .*)", (fitted.folder / "run" / CONSOLE).read_text())
    assert said.startswith(f"rank 1 on {socket.gethostname()} works {own[1]:.3f} s a step")

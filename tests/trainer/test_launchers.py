"""A script with a Trainer as a launcher starts it."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.train.conftest import Started
from toolkit.cluster.launch import free_port, local_command

ROOT = Path(__file__).parents[2]

SCRIPT = """
from tests.trainer.parts import Numbers, raises_on_rank_1
from toolkit import Trainer

Trainer({config!r}, dataset=Numbers(), on_step=raises_on_rank_1).fit()
"""


def test_a_hook_that_raises_under_the_deepspeed_launcher(tmp_path: Path, fitted_config: dict) -> None:  # type: ignore[type-arg]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(config=fitted_config))
    command = local_command("", num_procs=2)
    done = Started(tmp_path, script).run([*command[: command.index("--module")], str(script)], timeout_s=900)
    assert done.code == 3 and "Traceback" not in done.output, done.output
    assert done.output.count("error: step 2: the on_step hook raises_on_rank_1 raised KeyError on rank 1") == 1, done.output
    assert "step 1/4" in done.output


def test_an_example_under_torchrun(tmp_path: Path) -> None:
    """With reading processes, as the example has them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}"]
    done = Started(tmp_path, tmp_path).run([*command, str(ROOT / "examples/own_dataset.py"), "parallel.pp=2"], timeout_s=900)
    assert done.code == 0, done.output
    assert "pp 2" in done.output and done.output.count("done: step 30/30") == 1 and done.output.count("step 30/30") == 2, done.output

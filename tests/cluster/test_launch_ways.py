"""Every way to start a run really starts it, and it has the losses of one process: Slurm, torchrun,
mpirun, DeepSpeed without ssh.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm as slurms
from tests.cluster.tiny import assert_same, metrics
from tests.cluster.two_hosts import ADDRESSES, TwoHosts

LAUNCH = [sys.executable, "-m", "toolkit", "launch"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurms.Slurm]:
    if reason := slurms.missing():
        pytest.skip(reason)
    with slurms.slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def test_slurm(slurm: slurms.Slurm, config: Path, reference: list[dict[str, float]], tmp_path: Path) -> None:
    run = config.parent / "slurm"
    words = [*LAUNCH, str(config), "parallel.pp=2", f"run.dir={run}", "--slurm", "--ranks-per-node", "2", "--cpu"]
    words += ["--option", "overcommit", "--option", f"output={tmp_path}/job.log", "--option", f"chdir={tmp_path}"]
    submitted = slurm.call(*words)
    assert submitted.returncode == 0, submitted.stderr
    state, code = slurm.wait(submitted.stdout.split()[-1])
    log = (tmp_path / "job.log").read_text()
    assert (state, code) == ("COMPLETED", "0:0"), log
    assert_same(metrics(run), reference)


def test_a_run_that_slurm_starts_and_the_rules_refuse_is_one_message(slurm: slurms.Slurm, config: Path, tmp_path: Path) -> None:
    words = [*LAUNCH, str(config), "--slurm", "--ranks-per-node", "2", "--cpu", "--option", f"output={tmp_path}/job.log"]
    script = slurm.call(*words, "--dry-run").stdout.replace(str(config), f"{config} parallel.tp=2 model.num_attention_heads=3")
    (tmp_path / "job.sh").write_text(script)  # as a user who changes the script by hand
    state, _ = slurm.wait(slurm.call("sbatch", "--overcommit", str(tmp_path / "job.sh")).stdout.split()[-1])
    log = (tmp_path / "job.log").read_text()
    assert state == "FAILED" and log.count("num_attention_heads=3") == 1 and "Exited with exit code 2" in log and "Traceback" not in log, (
        log
    )


def test_torchrun_on_two_nodes(config: Path, reference: list[dict[str, float]], two_hosts: TwoHosts) -> None:
    run = config.parent / "torchrun"
    words = [*LAUNCH, str(config), "parallel.pp=2", f"run.dir={run}", "--torchrun", "--nodes", "2", "--ranks-per-node", "1"]
    words += ["--master-addr", ADDRESSES["host-a"]]
    started = [two_hosts.start(words, host=host) for host in ("host-b", "host-a")]  # in any order
    outputs = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n---\n".join(outputs)
    assert_same(metrics(run), reference)


def test_deepspeed_without_ssh(config: Path, reference: list[dict[str, float]], two_hosts: TwoHosts) -> None:
    run = config.parent / "no-ssh"
    words = [*LAUNCH, str(config), "parallel.pp=2", f"run.dir={run}", "--hostfile", str(two_hosts.hostfile)]
    words += ["--master-addr", ADDRESSES["host-a"], "--node-rank"]
    started = [two_hosts.start([*words, str(rank)], host=host) for rank, host in enumerate(("host-a", "host-b"))]
    outputs = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n---\n".join(outputs)
    assert_same(metrics(run), reference)


def test_mpirun(config: Path, reference: list[dict[str, float]], two_hosts: TwoHosts) -> None:
    if subprocess.run(["sh", "-c", "command -v mpirun"], capture_output=True).returncode:
        pytest.skip("mpirun is not installed: apt-get install openmpi-bin")
    run = config.parent / "mpirun"
    words = [*LAUNCH, str(config), "parallel.pp=2", f"run.dir={run}", "--hostfile", str(two_hosts.hostfile), "--runner", "openmpi"]
    code, output = two_hosts.shell(
        [*words, "--master-addr", ADDRESSES["host-a"]], timeout=900, environ={"HOME": os.environ.get("HOME", "/")}
    )
    assert code == 0, output
    assert_same(metrics(run), reference)

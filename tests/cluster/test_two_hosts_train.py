"""Training over two hosts, a pipeline stage on each, gives the losses of one process."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.tiny import assert_same, metrics
from tests.cluster.two_hosts import ADDRESSES, INTERFACE, REPOSITORY, TwoHosts
from toolkit.cluster.stalls import REQUEUE


@pytest.mark.all_cells  # the script below does the same
def test_a_pipeline_across_hosts_has_the_losses_of_one_process(
    two_hosts: TwoHosts, config: Path, reference: list[dict[str, float]]
) -> None:
    run = config.parent / "across"
    code, output = two_hosts.run("toolkit.train", [str(config), "parallel.pp=2", f"run.dir={run}"])
    assert code == 0, output
    assert_same(metrics(run), reference)


def test_the_shipped_script_starts_a_pipeline_across_hosts(
    two_hosts: TwoHosts, config: Path, reference: list[dict[str, float]], tmp_path: Path
) -> None:
    run = config.parent / "script"
    environ = {
        "HOSTFILE": str(two_hosts.hostfile),
        "MASTER_ADDR": ADDRESSES["host-a"],
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [str(REPOSITORY / "launch" / "multi-node.sh"), str(config), "parallel.pp=2", f"run.dir={run}"]
    code, output = two_hosts.shell(command, timeout=900, environ=environ)
    assert code == 0, output
    assert_same(metrics(run), reference)


def test_a_refused_config_is_one_message_with_exit_code_2(two_hosts: TwoHosts, config: Path) -> None:
    code, output = two_hosts.run("toolkit.train", [str(config), "parallel.pp=2", "parallel.tp=3"])
    assert code == 2 and "Traceback" not in output, output
    assert output.count("parallel.tp=3") >= 1


@pytest.mark.all_cells
@pytest.mark.parametrize("frozen", ["rank", "host"])
def test_a_frozen_host_is_named_and_does_not_hold_the_run(two_hosts: TwoHosts, config: Path, tmp_path: Path, frozen: str) -> None:
    """The other rank's watchdog reports it; a guard kills a frozen rank, and the launcher does not
    wait for a frozen host.
    """
    run = tmp_path / "run"
    words = [f"run.dir={run}", "train.steps=2000", "train.watchdog_s=5", "--hostfile", str(two_hosts.hostfile)]
    process = two_hosts.start([sys.executable, "-m", "toolkit.cli", "launch", str(config), *words])
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    stopped = [p for p in two_hosts.processes("host-b") if frozen == "host" or "toolkit.train" in p.cmdline()]
    stopped += [psutil.Process(two_hosts.pids["host-b"])] if frozen == "host" else []
    for one in stopped:
        one.suspend()
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        for one in stopped:
            with suppress(psutil.NoSuchProcess):
                one.resume()
    assert process.returncode == REQUEUE, output
    assert re.search(r"no progress for 5 s in step \d+: rank 0 waits in all-\S+ [\d,]+ .*rank 1 does not answer \(node-host-b\)", output), (
        output
    )

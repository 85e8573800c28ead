"""Training over two hosts, a pipeline stage on each, gives the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.tiny import assert_same, metrics
from tests.cluster.two_hosts import ADDRESSES, INTERFACE, REPOSITORY, TwoHosts


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

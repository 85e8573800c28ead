"""The launcher over two hosts: ranks on both, variables exported, exit codes and signals passed on."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.two_hosts import INTERFACE, REPOSITORY, TwoHosts

SMOKE = "tests.cluster.smoke"


def test_each_rank_runs_on_its_own_host_and_one_that_refuses_gives_its_exit_code(two_hosts: TwoHosts) -> None:
    code, output = two_hosts.run(SMOKE, ["c.yaml", "exit=2"])
    assert code == 2 and output.count("the one message") == 1, output
    ranks = re.findall(r"^(\S+): rank (\d) of 2 host=(\S+) net=(\S+) sum=3 argument=c.yaml$", output, re.MULTILINE)
    assert sorted(rank[:3] for rank in ranks) == [("host-a", "0", "node-host-a"), ("host-b", "1", "node-host-b")], output
    assert ranks[0][3] != ranks[1][3]


@pytest.mark.all_cells  # of the hosts of these tests: without it they would show nothing
def test_without_the_exported_interface_the_ranks_do_not_meet(two_hosts: TwoHosts) -> None:
    code, output = two_hosts.run(SMOKE, ["c.yaml", "meet=5"], environ={"GLOO_SOCKET_IFNAME": ""})
    assert code == 1 and "connectFullMesh failed" in output and "sum=3" not in output, output


def test_a_signal_to_the_launcher_reaches_the_ranks_of_both_hosts(two_hosts: TwoHosts, tmp_path: Path) -> None:
    process = two_hosts.launch(SMOKE, ["c.yaml", f"wait={tmp_path}"])
    deadline = time.monotonic() + 900
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    launcher = [p for p in two_hosts.processes("host-a") if len(p.cmdline()) > 1 and p.cmdline()[1].endswith("/deepspeed")]
    assert len(launcher) == 1
    launcher[0].terminate()
    output, _ = process.communicate(timeout=600)
    while two_hosts.processes("host-b") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sorted(p.name for p in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"], output


def test_a_pulled_cable_can_be_plugged_in_again(two_hosts: TwoHosts) -> None:
    ask = ["ssh", "-o", "ConnectTimeout=2", "host-b", "hostname"]
    two_hosts.link("host-b", up=False)
    assert two_hosts.shell(ask)[0] == 255
    two_hosts.link("host-b", up=True)
    ask[2] = "ConnectTimeout=30"
    assert two_hosts.shell(ask) == (0, "node-host-b\n")


def test_the_hosts_add_nothing_to_this_machine_and_leave_with_their_owner(two_hosts: TwoHosts, tmp_path: Path) -> None:
    here = subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True, check=True).stdout
    assert "10.77.0." not in here and "port-host" not in here
    code = (
        "import os, sys; from pathlib import Path; from tests.cluster.two_hosts import two_hosts\n"
        "with two_hosts(Path(sys.argv[1])) as hosts:\n"
        "    sys.stdout.write(' '.join(map(str, hosts.pids.values()))); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
    pids = killed.stdout.split()
    assert killed.returncode == -9 and len(pids) == 2, killed.stderr
    deadline = time.monotonic() + 60
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < deadline, "a host outlived the process that built it"
        time.sleep(0.05)
    assert two_hosts.shell(["ip", "-brief", "link", "show", INTERFACE])[0] == 0  # the others' hosts are untouched

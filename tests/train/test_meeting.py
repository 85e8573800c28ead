"""Where ranks meet: on one address of the first host where it is certain that all come to that one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cluster.launch import free_port
from toolkit.train.world import listen

RANK = """
import os
from toolkit.train.world import World, _store
from datetime import timedelta
store = _store(World.from_environment(), timedelta(seconds=120))
store.set(f"of {os.environ['RANK']}", "here")
store.wait([f"of {1 - int(os.environ['RANK'])}"])
if os.environ["RANK"] == "0":
    store.wait(["done"])
else:
    store.set("done", "1")
"""


@pytest.mark.parametrize("host, interface, expected", [("127.0.0.1", None, "127.0.0.1"), ("localhost", "lo", "127.0.0.1")])
def test_an_address_is_what_it_says_and_a_name_counts_on_its_interface(host: str, interface: str | None, expected: str) -> None:
    if interface and not Path("/sys/class/net", interface).exists():
        pytest.skip(f"there is no {interface}")
    found = listen(host, free_port(), interface=interface)
    assert found is not None
    with found:
        assert found.getsockname()[0] == expected


@pytest.mark.parametrize("host, interface", [("localhost", None), ("localhost", "no-such"), ("node.invalid", "lo"), ("192.0.2.1", None)])
def test_where_it_is_not_certain_torch_listens_as_it_does(host: str, interface: str | None) -> None:
    assert listen(host, free_port(), interface=interface) is None


def test_a_port_that_is_taken_is_left_to_torch_to_say() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert listen("127.0.0.1", taken.getsockname()[1], interface=None) is None


def test_ranks_meet_by_a_name_without_an_interface(tmp_path: Path) -> None:
    """The first rank then listens everywhere; the other must use the same names for what they store."""
    env = {k: v for k, v in os.environ.items() if "SOCKET_IFNAME" not in k and not k.startswith("TORCHELASTIC")}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK], env={**env, "RANK": str(rank)}) for rank in (0, 1)]
    assert [rank.wait(timeout=180) for rank in ranks] == [0, 0]

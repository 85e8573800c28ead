from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import two_hosts as hosts


@pytest.fixture(scope="session")
def hosts_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.TwoHosts]:
    if reason := hosts.missing():
        pytest.skip(reason)
    with hosts.two_hosts(tmp_path_factory.mktemp("hosts")) as running:
        yield running


@pytest.fixture
def two_hosts(hosts_of_session: hosts.TwoHosts) -> Iterator[hosts.TwoHosts]:
    """Two running hosts, built once for the session; what a test leaves running on them is ended after it."""
    yield hosts_of_session
    hosts_of_session.kill_all()

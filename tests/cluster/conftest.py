from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.runs import Run
from tests.cluster import two_hosts as hosts
from tests.cluster.tiny import metrics, write_config


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


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run's YAML."""
    return write_config(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="session")
def reference(config: Path) -> list[dict[str, float]]:
    """Metrics of the run in a single process."""
    run = Run(config)
    assert run.wait() == 0, run.text()
    return metrics(config.parent / "reference")

"""An elastic run over three hosts outlives what may happen to them, and loses no more than it promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster import two_hosts
from tests.cluster.elastic import LOST_AFTER_S, SEED, Elastic, Taken, steps_of, write_config
from tests.cluster.faults import FAULTS, SPARE, Fault
from tests.cluster.reliability import STEPS, outlive
from tests.pool import Pool


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("elastic"), steps=STEPS)


@pytest.fixture(scope="module")
def expected(config: Path, pool: Pool) -> dict[int, Taken]:
    """Every step of a run in one process, which the pool has started already."""
    run = config.parent / "uncut"
    raw = yaml.safe_load(config.read_text()) | {"run": {"dir": str(run), "seed": SEED}, "checkpoint": {"every": 0}}
    pool.run("tests.loop:train", 1, raw, deadline_s=300)
    return steps_of(run)


@pytest.fixture
def three_hosts(tmp_path: Path) -> Iterator[two_hosts.TwoHosts]:
    """Hosts of the test's own: it leaves them frozen, cut off or dead."""
    if reason := two_hosts.missing():
        pytest.skip(reason)
    with two_hosts.two_hosts(tmp_path, two_hosts.MORE_ADDRESSES) as hosts:
        yield hosts


@pytest.mark.parametrize("fault", [pytest.param(f, id=f.id, marks=() if f.default else pytest.mark.all_cells) for f in FAULTS])
def test_the_run_outlives(fault: Fault, three_hosts: two_hosts.TwoHosts, config: Path, expected: dict[int, Taken]) -> None:
    fewer = SPARE if fault.default else ()  # two hosts start in less time than three
    outlive(fault, three_hosts, config, expected, lost_after_s=LOST_AFTER_S, words=fewer)


def test_too_few_hosts_end_the_run_with_one_message(three_hosts: two_hosts.TwoHosts, config: Path) -> None:
    three_hosts.link("host-c", up=False)
    run = Elastic(three_hosts, config, "too-few", "--min-nodes", "3")
    assert run.finish() == 2
    assert "2 of 3 hosts are left, and --min-nodes is 3: host-c is lost" in run.output and "Traceback" not in run.output

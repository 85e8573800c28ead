"""A run's layout on fewer hosts: the config's own where all are there, a legal one with the same
global batch elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from toolkit.config.load import load_config
from toolkit.errors import LayoutError
from toolkit.parallel.rules import check
from toolkit.supervise.layouts import Layouts

MODEL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64, "vocab_size": 256}


def layouts(folder: Path, *, slots: int, hosts: int, batch: int = 12, **parallel: int) -> tuple[Layouts, Path]:
    train = {"global_batch_size": batch, "micro_batch_size": 1, "seq_length": 32, "precision": "fp32"}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, "train": train, "parallel": parallel}))
    return Layouts(path, [], slots=slots, hosts_of_config=hosts), path


def test_all_hosts_have_the_configs_own_layout(tmp_path: Path) -> None:
    found, _ = layouts(tmp_path, slots=2, hosts=3, pp=2)
    assert found.on(3).words == () and found.on(3).nodes == 3


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_fewer_hosts_have_a_legal_layout_with_the_same_batch(tmp_path: Path, nodes: int) -> None:
    found, path = layouts(tmp_path, slots=2, hosts=4, pp=2, tp=2)
    start = found.on(nodes)
    config = load_config(path, list(start.words))
    layout = check(config, start.nodes * 2)
    assert start.nodes == nodes and layout.world_size == 2 * nodes and config.train.global_batch_size == 12


def test_hosts_by_which_the_batch_does_not_divide_wait(tmp_path: Path) -> None:
    """4 layers and 8 sequences cannot be cut in three or five, so with five hosts four take part."""
    found, _ = layouts(tmp_path, slots=1, hosts=8, batch=8)
    assert [found.on(nodes).nodes for nodes in (5, 4, 2)] == [4, 4, 2]


def test_a_config_that_does_not_fit_its_own_hosts_is_refused(tmp_path: Path) -> None:
    found, _ = layouts(tmp_path, slots=1, hosts=2, tp=4)
    with pytest.raises(LayoutError, match=r"parallel\.tp=4"):
        found.on(2)

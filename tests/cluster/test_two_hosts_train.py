"""Training over two hosts, a pipeline stage on each, gives the losses of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.two_hosts import ADDRESSES, INTERFACE, REPOSITORY, TwoHosts
from toolkit.cluster.launch import run_local

STEPS = 3
CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 32,
    },
    "zero": {"stage": 2},
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "seq_length": 32, "precision": "fp32"},
    "data": {"tokenizer": "bytes", "workers": 0},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}, and a line follows a line.\n" for i in range(4000)))
    data = {**CONFIG["data"], "source": str(folder / "text.txt"), "cache_dir": str(folder / "data")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data, "run": {"dir": str(folder / "reference"), "seed": 7}}))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def reference(config: Path) -> list[dict[str, float]]:
    """Metrics of the run in a single process."""
    assert run_local(config, num_procs=1) == 0
    return metrics(config.parent / "reference")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(found: list[dict[str, float]], reference: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in reference] and len(found) == STEPS
    for line, expected in zip(found, reference, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_pipeline_across_hosts_has_the_losses_of_one_process(
    two_hosts: TwoHosts, config: Path, reference: list[dict[str, float]]
) -> None:
    run = config.parent / "across"
    code, output = two_hosts.run("toolkit.train", [str(config), "parallel.pp=2", f"run.dir={run}"])
    assert code == 0, output
    assert_same(metrics(run), reference)


def test_the_shipped_script_starts_it(two_hosts: TwoHosts, config: Path, reference: list[dict[str, float]], tmp_path: Path) -> None:
    run = config.parent / "script"
    environ = {
        "HOSTFILE": str(two_hosts.hostfile),
        "MASTER_ADDR": ADDRESSES["host-a"],
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [str(REPOSITORY / "launch" / "multi-node.sh"), str(config), "parallel.pp=2", f"run.dir={run}"]
    code, output = two_hosts.shell(command, timeout=300, environ=environ)
    assert code == 0, output
    assert_same(metrics(run), reference)


def test_a_refused_config_is_one_message_with_exit_code_2(two_hosts: TwoHosts, config: Path) -> None:
    code, output = two_hosts.run("toolkit.train", [str(config), "parallel.pp=2", "parallel.tp=3"])
    assert code == 2 and "Traceback" not in output, output
    assert output.count("parallel.tp=3") >= 1

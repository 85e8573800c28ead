"""What long sequences ask of a GPU's memory, rehearsed: inputs of layers that wait on the host, and
a loss whose logits never exist.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.cells import ON_HOST, Cell
from tests.rehearse.many import Task, rehearse_many
from toolkit.config.load import parse_config
from toolkit.cost import own_saved
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware
from toolkit.rehearse.session import Job, prepare, run

FULL = {"train.recompute": "full", "train.precision": "bf16", "zero.stage": 1, "model.num_layers": 5}


def test_inputs_of_recomputed_layers_wait_on_the_host() -> None:
    cells = [Cell(1, FULL), Cell(1, FULL | ON_HOST)]
    kept, moved = rehearse_many([Task(cell, 0, whole=False) for cell in cells])
    assert "error" not in kept and "error" not in moved, moved.get("trace")
    for cell, answer in zip(cells, (kept, moved), strict=True):
        w = Workload.of(parse_config(cell.raw()), 1)
        angles = 4 * w.seq * w.model.head_dim if w.offload_activations else 0  # they stay, and PyTorch's hook hides them from the meter
        assert answer["parts"]["activations"] == own_saved.stage_saved(w, 0, cpu=False)["activations"] - angles
    assert moved["host"]["peak"] - kept["host"]["peak"] >= 0.9 * own_saved.host_saved(w, 0) > 0
    streams = w.model.layers * w.tokens * w.width * w.model.hidden
    assert kept["parts"]["activations"] - moved["parts"]["activations"] >= streams
    assert moved["step"]["syncs"] == kept["step"]["syncs"], "the host does not wait for the copies"


@pytest.mark.all_cells
def test_the_logits_of_128k_tokens_never_exist() -> None:
    """Of a vocabulary of 128k they would take 64 GiB in fp32 alone."""
    model: dict[str, Any] = {"num_layers": 1, "hidden_size": 1024, "num_attention_heads": 8, "ffn_hidden_size": 2048}
    model |= {"vocab_size": 131072, "max_position_embeddings": 131072}
    train = {"seq_length": 131072, "global_batch_size": 1, "precision": "bf16"}
    config, _ = prepare(parse_config({"model": model, "train": train}), parse_hardware("h100-80gb:1"))
    (answer,) = run([Job(config=config, world=1, rank=0, steps=1, hardware="h100-80gb:1")])
    assert "error" not in answer, answer.get("trace")
    assert answer["allocated"] < 16 * 2**30 and not answer["overdrawn"]

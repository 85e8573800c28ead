"""A rank whose memory ends in training says so itself, with what it holds and what to set, and the
others end with it.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path

from tests.checkpoint.runs import Run
from tests.train.conftest import Started

LIMIT = 600 << 20  # bytes that the last rank may take beyond what libraries have


def test_the_rank_says_what_it_holds_and_what_to_set(shared: Started, tmp_path: Path) -> None:
    """The last stage has logits of 1 GiB a micro-batch, and several of them at once."""
    keys = ["parallel.pp=2", "train.seq_length=2048", "train.micro_batch_size=4", "model.max_position_embeddings=2048"]
    keys += ["model.vocab_size=32768", "train.chunked_loss=never", f"run.dir={tmp_path / 'run'}", "data.workers=0"]
    run = Run(shared.config, *keys, ranks=2, limits={resource.RLIMIT_DATA: LIMIT})
    run.wait()
    text = run.text()
    assert [process.exitcode for process in run.processes] == [1, 4], text
    assert "Traceback" not in text and "lost another rank" not in text, text
    said = re.search(r"^error: rank 1 \(stage 1\) ran out of memory for activations and gradients asking for .*$", text, re.M)
    assert said, text
    assert re.search(r"at its peak \(parameters .*, activations .*, logits .*\), of .* GiB a rank", said[0]), said[0]
    assert re.search(r"Set (train\.recompute|train\.micro_batch_size)=", said[0]), said[0]
    assert "ran out of memory" in (tmp_path / "run/console.log").read_text()

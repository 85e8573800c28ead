"""A model several times as large as the memory that converting it may take."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 33,
    "num_attention_heads": 16,
    "hidden_size": 1024,
    "intermediate_size": 16384,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LARGEST = 2 * 32000 * 1024  # bytes of its embedding, in bf16
BOUND = 2 * LARGEST + 2**30

SCRIPT = """
import sys
from pathlib import Path
from toolkit.convert.exporting import export_model
from toolkit.convert.importing import import_model
(import_model if sys.argv[1] == "import" else export_model)(Path(sys.argv[2]), Path(sys.argv[3]))
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def sparse(folder: Path) -> int:
    """A model whose weights are a hole in a file, which takes no room on the disk; bytes of weights."""
    from toolkit.arch.families import FORMATS
    from toolkit.config.load import parse_config
    from toolkit.convert.architecture import model_section

    form = FORMATS["llama"][1]
    spec = parse_config({"model": model_section(form, SHAPE, where="test")}).model.spec
    header: dict[str, Any] = {}
    at = 0
    for part in (p for weight in spec.weights() for p in form.parts(weight)):
        shape = list(part.shape)
        header[part.name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + at)
    return at


@pytest.mark.all_cells
def test_peak_memory(tmp_path: Path) -> None:
    size = sparse(tmp_path / "hf")
    assert size > 3 * BOUND
    for action, src, out in (("import", "hf", "ours"), ("export", "ours", "back")):
        command = [sys.executable, "-c", SCRIPT, action, str(tmp_path / src), str(tmp_path / out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        peak = 1024 * int(done.stdout.split()[-1])
        assert peak <= BOUND, f"{action}: {peak / 2**30:.2f} GiB, allowed are {BOUND / 2**30:.2f}"
    written = sum(f.stat().st_size for f in (tmp_path / "back").glob("*.safetensors"))
    assert size < written < size + 2**20

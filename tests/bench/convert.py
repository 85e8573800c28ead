"""Import and export of a Llama-3.2-1B-shaped folder: seconds, GB/s and peak memory, beside plain writing on the same disk.

`python -m tests.bench.convert --write docs/conversion.md` puts the table between that page's markers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
}
DEEPER = SHAPE | {"num_hidden_layers": 28}
"""The same layers, 2.0 billion parameters: more memory must not follow from more of them."""
SMALL = SHAPE | {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
BLOCK = 16 << 20


def make(folder: Path, shape: dict[str, Any]) -> int:
    """A folder with random bf16 weights of a shape, in one file, as the published one has; bytes of weights."""
    import torch
    from safetensors.torch import save_file

    from toolkit.arch.families import FORMATS
    from toolkit.config.load import parse_config
    from toolkit.convert.architecture import model_section

    folder.mkdir()
    form = FORMATS["llama"][1]
    spec = parse_config({"model": model_section(form, shape, where="bench")}).model.spec
    found = {}
    for weight in spec.weights():
        for part in form.parts(weight):
            bits = torch.randint(-(2**15), 2**15, part.shape, dtype=torch.int16)
            found[part.name] = (bits & 0x3FFF).view(torch.bfloat16)  # finite numbers, as hard to compress as any
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape))
    descriptor = os.open(folder / "model.safetensors", os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return sum(t.nbytes for t in found.values())


def child(action: str, src: Path, out: Path) -> dict[str, float]:
    """In a process of its own: seconds of the conversion itself, CPU seconds, and its peak resident memory in bytes."""
    script = f"import json; from tests.bench.convert import convert; print(json.dumps(convert({action!r}, {str(src)!r}, {str(out)!r})))"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"command_s": time.perf_counter() - started}


def convert(action: str, src: str, out: str) -> dict[str, float]:
    from toolkit.convert.exporting import export_model
    from toolkit.convert.importing import import_model

    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    (import_model if action == "import" else export_model)(Path(src), Path(out))
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    # not ru_maxrss: a child starts with its parent's
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "cpu_s": cpu, "rss": peak * 1024.0}


def plain(path: Path, size: int) -> float:
    """Seconds that writing as many bytes takes, from memory, in order, synced at the end."""
    block = os.urandom(BLOCK)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as f:
        for at in range(0, size, BLOCK):
            f.write(block[: size - at])
        os.fsync(f.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def measure(folder: Path, *, shape: dict[str, Any], rounds: int) -> dict[str, Any]:
    """All rounds in one folder; a round is a plain write, an import and an export, one after the other."""
    size = make(folder / "hf", shape)
    found: dict[str, list[dict[str, float]]] = {"plain": [], "import": [], "export": []}
    for _ in range(rounds):
        found["plain"].append({"seconds": plain(folder / "plain", size)})
        found["import"].append(child("import", folder / "hf", folder / "ours"))
        found["export"].append(child("export", folder / "ours", folder / "back"))
        for name in ("ours", "back"):
            shutil.rmtree(folder / name)
    return {"bytes": size, "rounds": found}


def table(places: dict[str, dict[str, Any]], rounds: int) -> str:
    from tests.bench.overhead import fill  # after the measurements: it imports torch

    size = next(iter(places.values()))["bytes"]
    lines = [
        fill(
            f"A folder of the shape of Llama 3.2 1B with random weights: {size / 1e9:.2f} GB of bf16, the largest tensor "
            f"{2 * SHAPE['vocab_size'] * SHAPE['hidden_size'] / 1e9:.2f} GB. Medians of {rounds} rounds, each a plain write, an import and an export."
        ),
        "",
        "| Where | What | Seconds | GB/s | CPU seconds | Peak memory, GiB | Whole command, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for where, found in places.items():
        size = found["bytes"]
        for what, label in (("plain", "the same bytes written in order and synced"), ("import", "`import`"), ("export", "`export`")):
            rows = found["rounds"][what]

            def median(key: str, rows: list[dict[str, float]] = rows) -> float:
                return statistics.median(r[key] for r in rows)

            cells = [f"{median('seconds'):.2f}", f"{size / 1e9 / median('seconds'):.2f}"]
            if what == "plain":
                cells += ["", "", ""]
            else:
                peak = max(r["rss"] for r in rows)
                cells += [f"{median('cpu_s'):.2f}", f"{peak / 2**30:.2f}", f"{median('command_s'):.1f}"]
            lines.append(f"| {where} | {label} | " + " | ".join(cells) + " |")
    bound = 2 * 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"] / 2**30 + 1
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.machine()
    )
    lines += [
        "",
        fill(
            f"Memory may reach 2 x the largest tensor + 1 GiB = {bound:.2f} GiB. {os.cpu_count()} cores ({cpu}), Python {platform.python_version()}, "
            f"torch {torch.__version__}; load average over the last 5 minutes {os.getloadavg()[1]:.1f}."
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, help="page to put the table into")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to measure")
    arguments = parser.parse_args()
    places: dict[str, dict[str, Any]] = {}
    memory = Path("/dev/shm")
    for where, parent in (("disk", arguments.disk), ("memory (tmpfs)", memory)):
        if parent.is_dir() and shutil.disk_usage(parent).free > 12e9 and (parent != memory or psutil.virtual_memory().available > 12e9):
            with tempfile.TemporaryDirectory(dir=parent, prefix="convert-") as folder:
                places[where] = measure(Path(folder), shape=SHAPE, rounds=arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.disk, prefix="convert-") as folder:
        places["disk, 28 layers, 2.0B parameters"] = measure(Path(folder), shape=DEEPER, rounds=arguments.rounds)
    text = table(places, arguments.rounds)
    sys.stdout.write(text + "\n")
    if arguments.write:
        page = arguments.write.read_text()
        first, last = "<!-- generated: convert -->", "<!-- end: convert -->"
        head, _, rest = page.partition(first)
        arguments.write.write_text(f"{head}{first}\n{text}\n{last}{rest.partition(last)[2]}")


if __name__ == "__main__":
    main()

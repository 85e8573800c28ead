"""Generating beside transformers: seconds a token, and from the command to the first token, on SmolLM2-135M-Instruct.

`python -m tests.bench.inference --write docs/inference.md` puts the table between that page's markers. Ours and theirs take
turns; each ratio is the median of the pairs' ratios, so that a machine that is busy now and then troubles both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "The capital of France is the city of Paris, and the capital of Italy is"
TOKENS = 24
PAIRS = 7
STARTS = 5
THEIRS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
ids = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""


def make(folder: Path) -> dict[str, Path]:
    """The model as Hugging Face folders in fp32 and bf16."""
    from tests.convert.test_smollm2 import gguf
    from toolkit.convert.exporting import export_model
    from toolkit.convert.importing import import_model

    import_model(gguf(), folder / "ours")
    for dtype in ("fp32", "bf16"):
        export_model(folder / "ours", folder / dtype, dtype=dtype)
    return {dtype: folder / dtype for dtype in ("fp32", "bf16")}


def decode(folder: Path, dtype: str) -> tuple[list[float], list[float], bool]:
    """Seconds of each generation of TOKENS tokens, ours and theirs by turns; and whether the tokens were the same."""
    import torch
    from transformers import AutoModelForCausalLM

    from toolkit.inference.request import Request
    from toolkit.inference.run import Session

    session = Session(Request(model=str(folder), prompts=[], dtype=dtype, max_new_tokens=TOKENS))
    session.text.stop = frozenset()
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    theirs.generation_config.eos_token_id = None
    ids = session.encode([PROMPT])

    def one() -> list[int]:
        answers = session.generate(ids)
        assert answers is not None
        return list(answers[0].tokens)

    def other() -> list[int]:
        out = theirs.generate(torch.tensor(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return list(out[0, len(ids[0]) :].tolist())

    same = one() == other()  # also warms both up
    pairs = [(_timed(one), _timed(other)) for _ in range(PAIRS)]
    return [a for a, _ in pairs], [b for _, b in pairs], same


def start(folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of a whole process that writes one token."""
    ours = [sys.executable, "-m", "toolkit", "generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "1"]
    theirs = [sys.executable, "-c", THEIRS, str(folder), PROMPT]
    run: Callable[[list[str]], Any] = lambda command: subprocess.run(command, check=True, capture_output=True)
    for command in (ours, theirs):
        run(command)  # the files are in memory from here on
    pairs = [(_timed(lambda: run(ours)), _timed(lambda: run(theirs))) for _ in range(STARTS)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def row(what: str, ours: list[float], theirs: list[float], *, scale: float, unit: str) -> str:
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    one, two = (statistics.median(v) * scale for v in (ours, theirs))
    return f"| {what} | {one:.1f} {unit} | {two:.1f} {unit} | {ratio:.2f} |"


def savings(folder: Path) -> str:
    """The table of `toolkit bench-inference`, in bf16."""
    command = [sys.executable, "-m", "toolkit", "bench-inference", str(folder), "--dtype", "bf16", "--tokens", "512"]
    rows, ranks, analysis = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\n\n")
    return f"{rows}\n\n```\n{ranks}\n```\n\n" + textwrap.fill(analysis.replace("\n", " "), 100)


def larger_than_memory(folder: Path) -> str:
    """A token and a start with layers from disk, beside the plain model, and what each had in memory (of two copies the first)."""
    lines = ["| | in memory of the model | peak of the process | a token |", "|---|---|---|---|"]
    ways = {
        "plain": [],
        "`--offload disk`": ["--offload", "disk"],
        "`--offload zero`, of two copies": ["--offload", "zero", "--num-procs", "2"],
    }
    for name, options in ways.items():
        command = [sys.executable, "-m", "toolkit", "generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", str(TOKENS)]
        found = json.loads(subprocess.run([*command, "--json", *options], check=True, capture_output=True, text=True).stdout)
        memory, seconds = found["rank_0"]["memory"], found["seconds"]["decode"] / found["rank_0"]["decoded_tokens"]
        share = f"{memory['held'] / 1e6:.0f} of {memory['model'] / 1e6:.0f} MB"
        lines.append(f"| {name} | {share} | {memory['peak'] / 1e6:.0f} MB | {1e3 * seconds:.0f} ms |")
    return "\n".join(lines)


def measure() -> dict[str, str]:
    """The page's blocks by name."""
    import torch

    lines = [
        f"SmolLM2-135M-Instruct, one process of {torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__};",
        f"{TOKENS} tokens after a prompt of 16, {PAIRS} pairs by turns, {STARTS} pairs of starts. Medians; a ratio below",
        "1 means that the toolkit is faster.",
        "",
        "| | toolkit | transformers | ratio |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="bench-inference-") as folder:
        folders = make(Path(folder))
        for dtype, path in folders.items():
            ours, theirs, same = decode(path, dtype)
            lines.append(row(f"a token, {dtype}{'' if same else ' (other tokens)'}", ours, theirs, scale=1000 / TOKENS, unit="ms"))
        for dtype, path in folders.items():
            lines.append(row(f"command to first token, {dtype}", *start(path), scale=1.0, unit="s"))
        return {"inference": "\n".join(lines), "savings": savings(folders["bf16"]), "larger": larger_than_memory(folders["bf16"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="page to put the table into")
    arguments = parser.parse_args()
    blocks = measure()
    sys.stdout.write("\n\n".join(blocks.values()) + "\n")
    if arguments.write:
        from tests.bench.overhead import write

        write(arguments.write, blocks)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

"""`toolkit convert import|export`: models in and out; torch is imported once there is something to
convert.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

app = typer.Typer(no_args_is_help=True, help="Models from and to Hugging Face.")

Dtype = Literal["fp32", "bf16", "fp16"]


@app.command("import")
def import_command(
    src: Annotated[Path, typer.Argument(help="a Hugging Face folder (Llama, GPT-2), a .gguf file, or nanoGPT's ckpt.pt")],
    out: Annotated[Path, typer.Argument(help="folder to write: weights, config.yaml, tokenizer")],
    dtype: Annotated[Dtype | None, typer.Option(help="store weights so; default: as they are")] = None,
    tokenizer: Annotated[bool, typer.Option("--tokenizer/--no-tokenizer", help="carry the tokenizer's files along")] = True,
) -> None:
    """Make a checkpoint to start training from (checkpoint.init_from) out of a pretrained model."""
    from toolkit.convert.importing import import_model

    started = time.perf_counter()
    with _progress(f"importing {src.name}") as progress:
        done = import_model(src, out, dtype=dtype, tokenizer=tokenizer, progress=progress)
    _say(f"{out}: {done.parameters:,} parameters in {done.dtype}{_rate(done.bytes, started)}")
    if done.tokenizer is None:
        _say(f"no tokenizer came with it: set data.tokenizer in {done.config}")
    _say(f"next: toolkit train {done.config} data.source=PATH")


@app.command("export")
def export_command(
    ckpt: Annotated[Path, typer.Argument(help="a run, a step-… folder or an imported folder, saved in any layout")],
    out: Annotated[Path, typer.Argument(help="folder to write for transformers, or a file.gguf for llama.cpp")],
    dtype: Annotated[Dtype | None, typer.Option(help="of the weights; default: as stored, or as trained")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="folder or tokenizer.json to carry along; default: the checkpoint's own")] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="largest file, 10^9 bytes")] = 5.0,
) -> None:
    """Make a folder that transformers loads, or a GGUF file, out of a checkpoint."""
    from toolkit.convert.exporting import export_model
    from toolkit.convert.gguf_export import export_gguf

    started = time.perf_counter()
    with _progress(f"exporting {ckpt.name}") as progress:
        if out.suffix == ".gguf":
            done = export_gguf(ckpt, out, dtype=dtype, tokenizer=tokenizer, progress=progress)
        else:
            done = export_model(ckpt, out, dtype=dtype, tokenizer=tokenizer, shard_gb=shard_gb, progress=progress)
    _say(f"{out}: {done.dtype} in {done.files} file{'s' if done.files > 1 else ''}{_rate(done.bytes, started)}")
    if done.tokenizer is None:
        _say("without a tokenizer: set --tokenizer to carry one along")


@contextmanager
def _progress(text: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _rate(size: int, started: float) -> str:
    seconds = time.perf_counter() - started
    return f", {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)"


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)

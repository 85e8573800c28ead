"""`toolkit evaluate`: the loss and perplexity of a checkpoint on data, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from toolkit.errors import at_least_one


def evaluate(
    ckpt: Annotated[Path, typer.Argument(help="a run, a step-… folder or an imported folder, saved in any layout")],
    data: Annotated[str, typer.Argument(help="a prepared prefix, a txt/jsonl/parquet file or folder, python-stdlib, or a hub name")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value over the checkpoint's own config")] = None,
    num_procs: Annotated[int | None, typer.Option(help="processes; default: this machine's GPUs, or as many as the layout needs")] = None,
    batches: Annotated[int | None, typer.Option(help="stop after so many global batches; default: all of the data, once")] = None,
    split: Annotated[Literal["all", "train", "valid", "test"], typer.Option(help="which part, cut as training cuts it")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a line")] = False,
) -> None:
    """Say how well a checkpoint predicts data: loss in nats a token and perplexity, each token
    once, without dropout.
    """
    import json
    import math
    import os
    import tempfile

    from toolkit.cluster.environment import PLANNED
    from toolkit.cluster.launch import run_local
    from toolkit.evaluate.resolve import RESULT, resolve_evaluation
    from toolkit.plan.commands import log_to_stderr

    at_least_one("--num-procs", num_procs)
    at_least_one("--batches", batches)
    log_to_stderr()
    asked = resolve_evaluation(ckpt, data, overrides or [], num_procs=num_procs, batches=batches, split=split)
    with tempfile.TemporaryDirectory(prefix="toolkit-evaluate-") as folder:
        config = asked.write(Path(folder))
        code = run_local(config, num_procs=asked.processes, module="toolkit.evaluate", environ={**os.environ, PLANNED: "1"})
        if code:
            raise typer.Exit(code)
        found = json.loads((Path(folder) / RESULT).read_text(encoding="utf-8"))
    loss, tokens, seconds = found["loss"], found["tokens"], found["seconds"]
    figures = {
        "checkpoint": str(asked.checkpoint),
        "step": asked.step,
        "data": data,
        "split": split,
        "whole": asked.whole,
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "bits_per_byte": loss * tokens / math.log(2) / asked.text_bytes if asked.text_bytes else None,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
        return
    part = "" if split == "all" else f", {split} split"
    part += "" if asked.whole else f", first {asked.task.batches} batches"
    per_byte = f" | {figures['bits_per_byte']:.4f} bits a byte" if figures["bits_per_byte"] is not None else ""
    typer.echo(
        f"{asked.checkpoint} on {data}{part}: loss {loss:.4f} | perplexity {math.exp(min(loss, 700)):.4g}{per_byte}"
        f" | {tokens:,} tokens in {seconds:.1f} s"
    )

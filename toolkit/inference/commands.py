"""`toolkit generate`: try a model; torch is imported once there is something to generate."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from click.core import ParameterSource

from toolkit.errors import ConfigError, at_least_one

Dtype = Literal["fp32", "bf16", "fp16"]
Bits = Literal["none", "int8", "int4"]
Kv = Literal["none", "int8", "cpu"]
Place = Literal["none", "cpu", "disk", "zero", "zero-cpu", "zero-nvme"]


def generate(
    ctx: typer.Context,
    ckpt: Annotated[
        Path, typer.Argument(help="a run, a step-… folder, an imported model, a Hugging Face folder, a .gguf or nanoGPT's ckpt.pt")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="parallel.tp=…, parallel.pp=…: how the model is cut")] = None,
    prompt: Annotated[str | None, typer.Option(help="text to go on from")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file of prompts, one a line; or .jsonl")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="prompts are a user's messages, written in the model's chat template")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the most probable token; the default")] = False,
    temperature: Annotated[float | None, typer.Option(help="draw: divides the logits")] = None,
    top_k: Annotated[int | None, typer.Option(help="draw from the k most probable tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the fewest tokens that have this probability together")] = None,
    seed: Annotated[int | None, typer.Option(help="decides the draws, on every layout alike")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="of weights and computation; default: as the weights are stored")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bytes, a tokenizer.json or a Hugging Face name; default: the model's own")] = None,
    batch_size: Annotated[int, typer.Option(help="prompts that each copy of the model computes at once")] = 8,
    weights: Annotated[Bits, typer.Option(help="keep weights in 8 or 4 bits (torchao)")] = "none",
    kv: Annotated[Kv, typer.Option(help="keep keys and values in 8 bits, or in the CPU's memory")] = "none",
    grow: Annotated[bool, typer.Option("--kv-grow", help="take memory for keys and values as it fills, not for all at once")] = False,
    prune: Annotated[str, typer.Option(help="set this share of each layer's weights to 0, or 2:4")] = "none",
    offload: Annotated[Place, typer.Option(help="keep layers there, and two of them in memory")] = "none",
    layers_per_stage: Annotated[str, typer.Option(help="how pipeline stages share the layers: even, measured, or 10,6")] = "even",
    rebalance: Annotated[
        bool, typer.Option("--rebalance", help="move the cut between prompts when a device has become slower or fuller")
    ] = False,
    nvme_path: Annotated[Path | None, typer.Option(help="folder on a local disk for --offload zero-nvme")] = None,
    memory_limit: Annotated[float | None, typer.Option(help="let a rank take only so many GiB beside its libraries")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="choose cut, offload and quantisation for the devices that are there")] = False,
    interactive: Annotated[bool, typer.Option("--interactive", help="a conversation; devices may come and go between lines")] = False,
    num_procs: Annotated[int | None, typer.Option(help="processes on this machine; default: as many as the degrees make")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="answers, their tokens and times as JSON")] = False,
) -> None:
    """Generate text with a model, cut over as many processes as there are."""
    from toolkit.inference.request import Request, Sampling
    from toolkit.inference.text import read_prompts
    from toolkit.parallel.generation import counts_of
    from toolkit.plan.commands import log_to_stderr

    log_to_stderr()  # standard output has the answers alone
    at_least_one("--max-new-tokens", max_new_tokens)
    at_least_one("--batch-size", batch_size)
    at_least_one("--num-procs", num_procs)
    sampling = Sampling.of(greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if prompt is not None and prompts is not None:
        raise ConfigError("--prompt beside --prompts", why="both say what to go on from", fix="Leave one of the two out.")
    if interactive and (prompt is not None or prompts is not None):
        raise ConfigError("--interactive beside a prompt", why="it reads prompts as they are typed", fix="Leave one of the two out.")
    if prompt is None and prompts is None and not interactive:
        raise ConfigError("there is no prompt", fix="Set --prompt TEXT, --prompts FILE or --interactive.")
    if rebalance and prompt is not None:
        raise ConfigError("--rebalance beside --prompt", why="the cut moves between prompts", fix="Set --prompts or --interactive.")
    request = Request(
        model=str(ckpt),
        prompts=[prompt] if prompt is not None else read_prompts(prompts) if prompts is not None else [],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        overrides=overrides or [],
        dtype=dtype,
        tokenizer=tokenizer,
        chat=chat,
        batch=batch_size,
        as_json=as_json,
        weights=weights,
        kv=kv,
        grow=grow,
        prune=prune,
        offload=offload,
        layers_per_stage=layers_per_stage,
        rebalance=rebalance,
        nvme_path=None if nvme_path is None else str(nvme_path),
        memory_limit=memory_limit,
    )
    if offload.startswith("zero") and (auto or interactive):
        raise ConfigError(
            f"--offload {offload} beside --{'auto' if auto else 'interactive'}",
            why="it makes as many copies of the model as there are devices, and they share out the layers",
            fix="Leave one of the two out.",
        )
    if offload == "zero-nvme" and not (nvme_path and nvme_path.is_dir()):
        what = f"--nvme-path {nvme_path} is no folder" if nvme_path else "--offload zero-nvme without --nvme-path"
        raise ConfigError(what, why="parts of weights are written there", fix="Name a folder on a local disk.")
    if nvme_path and offload == "zero-nvme":
        from toolkit.cluster.locks import check_extension_locks
        from toolkit.cluster.needs import check_generation_on_nvme

        check_generation_on_nvme(nvme_path)
        check_extension_locks({"async_io"})
    if nvme_path and offload != "zero-nvme":
        raise ConfigError("--nvme-path without --offload zero-nvme", why="nothing is written there", fix="Leave one of the two out.")
    if (counts := counts_of(layers_per_stage)) and (auto or interactive):
        raise ConfigError(
            f"--layers-per-stage {layers_per_stage} beside --{'auto' if auto else 'interactive'}",
            why="it chooses the number of stages by the devices that are there",
            fix="Leave one of the two out.",
        )
    if counts and not any(o.partition("=")[0].strip() == "parallel.pp" for o in request.overrides):
        request = replace(request, overrides=[*request.overrides, f"parallel.pp={len(counts)}"])
    fixed = [name for name in ("weights", "offload") if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if interactive:
        from toolkit.inference.interactive import converse

        converse(request, devices=num_procs, fixed=fixed, lines=sys.stdin, out=sys.stdout)
        return
    if auto:
        from toolkit.inference.auto import choice_for, devices_here, with_choice

        choice = choice_for(request, devices=devices_here(num_procs), fixed=fixed)
        for reason in choice.reasons:
            typer.echo(f"auto: {reason}", err=True)
        request, num_procs = with_choice(request, choice), choice.way.world
    processes = num_procs or _degrees(request.overrides)
    if processes > 1:
        raise typer.Exit(_on_ranks(request, processes))
    from toolkit.train.program import quiet

    quiet()
    from toolkit.inference.run import run

    run(request)


def bench_inference(
    ckpt: Annotated[Path, typer.Argument(help="as toolkit generate's")],
    overrides: Annotated[list[str] | None, typer.Argument(help="parallel.tp=…, parallel.pp=…")] = None,
    data: Annotated[Path | None, typer.Option(help="held-out text; default: the Python language reference that comes with Python")] = None,
    tokens: Annotated[int, typer.Option(help="tokens of it that are predicted")] = 1024,
    dtype: Annotated[Dtype | None, typer.Option(help="as toolkit generate's")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="as toolkit generate's")] = None,
    num_procs: Annotated[int | None, typer.Option(help="processes on this machine; default: as many as the degrees make")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """Measure what each memory saving buys and costs: bytes, tokens a second, perplexity, agreement
    with the plain model.
    """
    from toolkit.inference.request import Request
    from toolkit.plan.commands import log_to_stderr

    log_to_stderr()
    at_least_one("--num-procs", num_procs)
    if tokens < 64:
        raise ConfigError(f"--tokens {tokens} says little of a model", fix="Set it to 64 or more.")
    request = Request(
        model=str(ckpt),
        prompts=[],
        overrides=overrides or [],
        dtype=dtype,
        tokenizer=tokenizer,
        as_json=as_json,
        bench=str(data or ""),
        max_new_tokens=tokens,
    )
    processes = num_procs or _degrees(request.overrides)
    if processes > 1:
        raise typer.Exit(_on_ranks(request, processes))
    from toolkit.train.program import quiet

    quiet()
    from toolkit.inference.bench import run

    run(request)


def _degrees(overrides: list[str]) -> int:
    """Processes that one copy of the model takes; what is no number is refused later, with all else
    that is wrong.
    """
    product = 1
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip() in ("parallel.tp", "parallel.pp") and value.strip().isdigit():
            product *= max(1, int(value))
    return product


def _on_ranks(request: object, processes: int) -> int:
    from toolkit.inference.ranks import run_ranks
    from toolkit.inference.request import Request

    assert isinstance(request, Request)
    with tempfile.TemporaryDirectory(prefix="toolkit-generate-") as folder:
        path = Path(folder) / "request.json"
        request.save(path)
        return run_ranks(path, processes=processes)

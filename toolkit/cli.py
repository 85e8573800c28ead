"""The command `toolkit`: each verb is one call."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit import __version__
from toolkit.calibrate.commands import calibrate
from toolkit.checkpoint.commands import app as checkpoint_app
from toolkit.convert.commands import app as convert_app
from toolkit.doctor.commands import doctor
from toolkit.errors import ConfigError, ToolkitError, at_least_one
from toolkit.evaluate.commands import evaluate
from toolkit.files import keep_others_out
from toolkit.inference.commands import Bits, Kv, Place, bench_inference, generate
from toolkit.plan.commands import log_to_stderr, tune
from toolkit.profile.commands import profile
from toolkit.redact import hide_secrets, redact
from toolkit.rehearse.commands import rehearse
from toolkit.report.commands import report
from toolkit.supervise.commands import launch

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Train GPT and Llama on megatron-core × DeepSpeed.")
data_app = typer.Typer(no_args_is_help=True, help="Text to tokens.")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(convert_app, name="convert")
app.command()(tune)
app.command()(evaluate)
app.command()(calibrate)
app.command()(profile)
app.command()(generate)
app.command()(bench_inference)
app.command()(rehearse)
app.command()(report)
app.command()(launch)
app.command()(doctor)

NO = 1  # exit code of a question whose answer is no


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"toolkit {__version__}")
        raise typer.Exit


@app.callback()
def command(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Train GPT and Llama on megatron-core × DeepSpeed."""


Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, each replacing one key of the YAML")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="the run's YAML")],
    overrides: Overrides = None,
    num_procs: Annotated[int | None, typer.Option(help="processes on this machine; default: its GPUs, or 1")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="`HOST slots=RANKS` a line: start on these hosts, over ssh")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run, and start nothing")] = False,
) -> None:
    """Train on this machine, or on the hosts of a hostfile, through the deepspeed launcher."""
    import os
    from functools import partial

    from toolkit.cluster.environment import PLANNED, gpu_count
    from toolkit.cluster.hosts import LOCAL, read_hostfile
    from toolkit.cluster.launch import run_local, run_on_hosts
    from toolkit.cluster.stalls import STALLED
    from toolkit.config.load import load_config
    from toolkit.train.console import watched
    from toolkit.train.resolve import resolve

    at_least_one("--num-procs", num_procs)
    if hostfile is not None:
        hosts = read_hostfile(hostfile)
        if num_procs is not None or dry_run:
            other = "--num-procs" if num_procs is not None else "--dry-run"
            raise ConfigError(f"{other} beside --hostfile", why="the hostfile says what runs where", fix="Leave one of the two out.")
        if not hosts.keys() <= LOCAL:
            folder = resolve(load_config(config, overrides or []), sum(hosts.values())).config.run.dir
            look = ["toolkit", "doctor", str(config), *(overrides or []), "--hostfile", str(hostfile)]
            run = partial(run_on_hosts, config, overrides or [], hostfile=hostfile, stalled=folder / STALLED)
            raise typer.Exit(watched(run, folder=folder, doctor=look))
        num_procs = sum(hosts.values())
    processes = num_procs or gpu_count() or 1
    if dry_run:
        from toolkit.train.dry_run import dry_run as say_what_would_run

        typer.echo(say_what_would_run(config, overrides or [], load_config(config, overrides or []), processes=processes), nl=False)
        return
    resolved = resolve(load_config(config, overrides or []), processes)  # what is wrong is said before any process starts
    run = partial(run_local, config, overrides or [], num_procs=processes, environ={**os.environ, PLANNED: "1"})
    look = ["toolkit", "doctor", str(config), *(overrides or []), "--num-procs", str(processes)]
    raise typer.Exit(watched(run, folder=resolved.config.run.dir, doctor=look))


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="YAML to write")] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(help="a preset such as llama3.2-1b, or small")] = None,
    data: Annotated[str | None, typer.Option(help="text, a prepared prefix, a hub name or python-stdlib")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bytes, a tokenizer.json, a Hugging Face name, or train:N")] = None,
    hardware: Annotated[str | None, typer.Option(help="GPU:PER_NODExNODES; default: this machine")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 200,
) -> None:
    """Write a run's YAML that fits the hardware; what is not given is asked for in a terminal."""
    from toolkit.cluster.environment import gpu_count
    from toolkit.hardware.catalogue import parse_hardware
    from toolkit.plan.here import hardware_here
    from toolkit.plan.init import SMALL, run_sections, write_config

    def ask(given: str | None, question: str, default: str) -> str:
        if given is not None or not sys.stdin.isatty():
            return given or default
        return str(typer.prompt(question, default=default))

    at_least_one("--steps", steps)
    cluster = parse_hardware(hardware) if hardware else hardware_here(gpu_count() or 1)
    if cluster is None:
        raise ConfigError("this machine's GPU is not in the catalogue", fix="Name a similar one: --hardware GPU:N.")
    model = ask(model, "model: small, or a preset such as llama3.2-1b", SMALL)
    data = ask(data, "data: text file or folder, prepared prefix, hub name", "python-stdlib")
    accelerator = cluster.gpu.accelerator
    raw = run_sections(model=model, source=data, tokenizer=tokenizer, name=out.stem, steps=steps, accelerator=accelerator)
    plan, start = write_config(out, raw, cluster)
    typer.echo(f"{out}: {plan.gpus} of {cluster}, {plan.worst.device / 2**30:.1f} GiB a rank; start it with: {start}")


@app.command()
def estimate(
    config: Annotated[Path | None, typer.Argument(help="the run's YAML")] = None,
    overrides: Overrides = None,
    hardware: Annotated[str | None, typer.Option(help="GPU:PER_NODExNODES, e.g. h100-80gb:8x4")] = None,
    hardware_file: Annotated[Path | None, typer.Option(help="YAML with more GPUs")] = None,
    host_gib: Annotated[float | None, typer.Option(help="RAM of a node for offload, GiB; default: the catalogue's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    jsonl: Annotated[Path | None, typer.Option(help="published measurements to predict, instead of CONFIG")] = None,
    out: Annotated[Path | None, typer.Option(help="where --jsonl writes its predictions")] = None,
    calibration: Annotated[Path | None, typer.Option(help="scalars of your own, from toolkit calibrate")] = None,
    inference: Annotated[
        bool, typer.Option("--inference", help="of generating; CONFIG may then also be what toolkit generate takes")
    ] = False,
    batch: Annotated[int | None, typer.Option(help="--inference: texts that each copy of the model computes at once (default: 1)")] = None,
    context: Annotated[int | None, typer.Option(help="--inference: tokens of prompt and answer; default: the model's context")] = None,
    weights: Annotated[Bits | None, typer.Option(help="--inference: as toolkit generate's")] = None,
    kv: Annotated[Kv | None, typer.Option(help="--inference: as toolkit generate's")] = None,
    offload: Annotated[Place | None, typer.Option(help="--inference: as toolkit generate's")] = None,
) -> None:
    """Say how much memory a run needs and how long a step takes, without a GPU; exit code 1 where
    it does not fit.
    """
    savings = {name: value for name, value in (("weights", weights), ("kv", kv), ("offload", offload)) if value is not None}
    if not inference and (batch is not None or context is not None or savings):
        name = next(iter([n for n, v in (("batch", batch), ("context", context)) if v is not None] + list(savings)))
        raise ConfigError(f"--{name} without --inference", why="it says how a model generates", fix="Add --inference, or leave it out.")
    if jsonl is not None:
        from toolkit.evidence.published import predict_file

        if out is None:
            raise ConfigError("--jsonl has no place to write to", fix="Set --out FILE.")
        typer.echo(str(predict_file(jsonl, out)))
        return
    if config is None or hardware is None:
        missing = "CONFIG" if config is None else "--hardware"
        raise ConfigError(f"{missing} is missing", fix="For example: toolkit estimate run.yaml --hardware h100-80gb:8x4")
    import json

    from toolkit.config.load import load_config
    from toolkit.data.vocabulary import with_vocabulary
    from toolkit.hardware.catalogue import parse_hardware, with_host_gib
    from toolkit.plan.show import estimate_json, estimate_text, fits

    if as_json:
        log_to_stderr()
    cluster = parse_hardware(hardware, extra=hardware_file)
    if host_gib is not None:
        cluster = with_host_gib(cluster, host_gib)
    if inference:
        from toolkit.inference.estimate import Asked, estimate_generation

        asked = Asked(batch=1 if batch is None else batch, context=context, **savings)
        text, enough = estimate_generation(config, overrides or [], cluster, asked=asked, as_json=as_json)
        typer.echo(text, nl=False)
        raise typer.Exit(0 if enough else NO)
    loaded = with_vocabulary(load_config(config, overrides or []))
    if as_json:
        typer.echo(json.dumps(estimate_json(loaded, cluster, calibrated=calibration), indent=1))
    else:
        typer.echo(estimate_text(loaded, cluster, calibrated=calibration), nl=False)
    raise typer.Exit(0 if fits(loaded, cluster) else NO)


@data_app.command("prepare")
def prepare_data(
    source: Annotated[str, typer.Argument(help="python-stdlib, a txt/jsonl/parquet file or folder, or a hub name")],
    out: Annotated[Path, typer.Option(help="prefix to write: OUT.bin, OUT.idx, OUT.manifest.json")],
    tokenizer: Annotated[str, typer.Option(help="bytes, a tokenizer.json, a Hugging Face name, or train:N")] = "bytes",
    text_key: Annotated[str, typer.Option(help="field that holds the text of a row")] = "text",
    workers: Annotated[int | None, typer.Option(help="processes; default: one per core")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an OUT that holds something else")] = False,
) -> None:
    """Tokenize text into Megatron's .bin/.idx; resumes where it was cut off."""
    from toolkit.cluster.environment import usable_cores
    from toolkit.data.prepare import prepare

    at_least_one("--workers", workers)
    manifest = prepare(source, tokenizer=tokenizer, out=out, text_key=text_key, workers=workers or usable_cores(), overwrite=overwrite)
    typer.echo(f"{out}: {manifest.documents:,} documents, {manifest.tokens:,} tokens of {manifest.tokenizer.vocab_size:,} ids")


def main() -> None:
    """Entry point: a user error becomes one message and its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("megatron").setLevel(logging.ERROR)  # it names options that are absent
    hide_secrets()
    keep_others_out()
    try:
        app(prog_name="toolkit")
    except ToolkitError as error:
        sys.stderr.write(redact(f"error: {error}\n"))
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()

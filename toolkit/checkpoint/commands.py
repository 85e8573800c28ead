"""`toolkit checkpoint list|verify|prune DIR`: what a person asks of a folder of checkpoints; needs
no torch.
"""

from __future__ import annotations

import secrets
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from toolkit.checkpoint.folders import prune
from toolkit.checkpoint.manifest import NAME, CheckpointFolder, Manifest, discover, is_folder_name, look_at, read_manifest, verify_files
from toolkit.errors import CheckpointError
from toolkit.files import FolderLock, remove_leftovers, remove_tree

app = typer.Typer(no_args_is_help=True, help="Look at, check and thin out a run's checkpoints.")

Folder = Annotated[Path, typer.Argument(help="a run folder, a folder of checkpoints, or one checkpoint")]


@app.command("list")
def list_checkpoints(folder: Folder) -> None:
    """Every checkpoint, newest first; sizes are checked, contents are not."""
    table = Table("step", "state", box=None)
    for column in ("size", "saved (UTC)", "ranks", "layout", "samples"):
        table.add_column(column, no_wrap=True)
    for f in _checkpoints_in(folder):
        m = f.manifest
        if m is None:
            table.add_row(str(f.step), f"{'damaged' if f.finished else 'unfinished'}: {f.problem}", "", "", "", "", "")
            continue
        degrees = {k: m.layout[k if k == "dp" else f"parallel.{k}"] for k in ("tp", "pp", "vpp", "dp")}
        cut = [f"{k} {v}" for k, v in degrees.items() if v > 1]
        cut += [f"ZeRO-{m.layout['zero.stage']}", m.layout["train.precision"]]
        table.add_row(
            str(f.step),
            "weights only" if m.weights_only else "complete",
            _size(f.bytes),
            m.saved_at[:16].replace("T", " "),
            str(m.processes),
            " ".join(cut),
            f"{m.consumed_samples:,}",
        )
    _console().print(table)


@app.command("verify")
def verify(folder: Folder) -> None:
    """Read every file of every checkpoint and compare its checksum; exit code 2 when one is damaged."""
    checkpoints = _checkpoints_in(folder)
    problems = _verified(checkpoints)
    console = _console()
    for f in checkpoints:
        if f.path.name in problems:
            console.print(f"{f.path.name}: DAMAGED: {problems[f.path.name]}", soft_wrap=True)
        elif not f.finished:
            console.print(f"{f.path.name}: unfinished, saving was cut off", soft_wrap=True)
        else:
            console.print(f"{f.path.name}: good")
    if problems:
        raise CheckpointError(
            f"{len(problems)} of {len(checkpoints)} checkpoints in {folder} are damaged",
            fix="Nothing was deleted; a run resumes from the newest good one with checkpoint.resume=auto.",
        )


@app.command("prune")
def prune_checkpoints(
    folder: Folder,
    keep: Annotated[int, typer.Option(min=1, help="complete checkpoints to keep")] = 2,
) -> None:
    """Delete all but the newest good checkpoints, and what killed runs left half-written; damaged
    ones stay.
    """
    if (folder / NAME).exists():
        raise CheckpointError(f"{folder} is one checkpoint", fix="Name a run folder, or the folder its checkpoints are in.")
    folder = _folder(folder)
    lock = FolderLock(folder)
    try:
        checkpoints = discover(folder)
        good, distrusted = 0, dict[str, str]()
        for f in checkpoints:  # newest first, until enough are known to be good
            if good < keep and f.finished:
                problems = _verified([f])
                distrusted |= problems
                good += not problems
        token = secrets.token_hex(4)
        gone = [p.name for p in prune(folder, keep=keep, token=token, distrusted=distrusted)]
        for f in checkpoints:
            if not f.finished:
                remove_tree(f.path, token=token)
                gone.append(f.path.name)
        gone += remove_leftovers(folder)
    finally:
        lock.release()
    _console().print(f"deleted {', '.join(gone)}" if gone else "nothing to delete", soft_wrap=True)
    for name, problem in distrusted.items():
        _console().print(f"{name} stays, damaged: {problem}", soft_wrap=True)


@app.command("reshard")
def reshard_checkpoint(
    source: Annotated[Path, typer.Argument(help="a step-… folder, or a run folder: its newest complete checkpoint")],
    out: Annotated[Path, typer.Argument(help="a new run folder, or a new step-… folder")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="parallel.*=…, zero.*=…, train.precision=…: the layout to cut it for")
    ] = None,
    num_procs: Annotated[int | None, typer.Option(help="processes of the run that will resume; default: as many as saved it")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes that do the work; default: one per core")] = None,
) -> None:
    """Cut a checkpoint for another layout, optimizer states included, without starting a run."""
    from toolkit.checkpoint.target import Target
    from toolkit.cluster.environment import usable_cores

    path, manifest = _complete(source)
    target = Target.of(manifest, overrides or [], processes=num_procs, path=path)
    if out.exists():
        raise CheckpointError(f"{out} exists", why="a checkpoint is never written over", fix="Name a folder that does not exist.")
    if is_folder_name(out.name) and out.name != path.name:
        raise CheckpointError(f"{out} is not named as {path}", why=f"it is of step {manifest.step}", fix=f"Name it {path.name}.")
    folder = out.parent if is_folder_name(out.name) else out / "checkpoints"
    from toolkit.checkpoint.reshard import reshard, work_bytes  # torch comes with it, once there is something to do

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"resharding {path.name}", total=work_bytes(manifest))
        final = reshard(path, folder, target, workers=workers or usable_cores(), progress=partial(progress.advance, task))
    p, z = target.layout, target.config.zero
    shared = f" cp {p.cp}" if p.cp > 1 else ""
    _console().print(
        f"{final}: step {manifest.step} for {p.world_size} processes, tp {p.tp} pp {p.pp} vpp {p.vpp}{shared} dp {p.dp}, ZeRO-{z.stage}",
        soft_wrap=True,
    )


def _complete(source: Path) -> tuple[Path, Manifest]:
    """A complete checkpoint: the folder itself, or the newest one in it."""
    if not (source / NAME).exists():
        newest = next((f for f in _checkpoints_in(source) if f.finished), None)
        if newest is None:
            raise CheckpointError(f"{source} holds no complete checkpoint", fix="Name a folder that does.")
        source = newest.path
    try:
        return source, read_manifest(source)
    except ValueError as e:
        raise CheckpointError(str(e), fix="Name another checkpoint.") from None


def _folder(folder: Path) -> Path:
    inside = folder / "checkpoints"
    folder = inside if inside.is_dir() else folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder", fix="Name a run folder, or the folder its checkpoints are in.")
    return folder


def _checkpoints_in(folder: Path) -> list[CheckpointFolder]:
    if (folder / NAME).exists():  # one checkpoint, or what `toolkit convert import` wrote
        return [look_at(folder)]
    folder = _folder(folder)
    checkpoints = discover(folder)
    if not checkpoints:
        raise CheckpointError(f"{folder} holds no checkpoint", fix="Name a run folder, or the folder its checkpoints are in.")
    return checkpoints


def _verified(checkpoints: list[CheckpointFolder]) -> dict[str, str]:
    """Folder name -> what is wrong, of the damaged ones."""
    problems = {f.path.name: f.problem for f in checkpoints if f.finished and f.manifest is None}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for f in checkpoints:
            if f.manifest is not None:
                task = progress.add_task(f.path.name, total=f.bytes)
                if problem := verify_files(f.path, f.manifest.files, progress=partial(progress.advance, task)):
                    problems[f.path.name] = problem
    return problems


def _size(value: float) -> str:
    for unit in ("B", "kiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _console() -> Console:
    return Console()

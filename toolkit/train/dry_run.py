"""`toolkit train --dry-run`: what a run would do, checked as at its start and said in words,
without starting anything.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from toolkit.checkpoint.claim import checkpoint_folder
from toolkit.checkpoint.start import starting_weights
from toolkit.cluster.environment import rank_environment
from toolkit.cluster.launch import local_command
from toolkit.cluster.needs import check_needs
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import cache_dir_of, resolve_data
from toolkit.data.vocabulary import with_vocabulary
from toolkit.errors import DataError
from toolkit.parallel.layout import Layout
from toolkit.parallel.rules import check
from toolkit.plan.here import hardware_here
from toolkit.plan.show import estimate_text
from toolkit.runfolder import files
from toolkit.train.resolve import machine


def dry_run(path: Path, overrides: Sequence[str], config: RunConfig, *, processes: int) -> str:
    """The layout, the memory and time that are estimated, the data, the files and the command of a run.

    Raises what starting it would raise, but for data that is yet to be prepared, which it says.
    """
    layout = check(config, processes, machine=machine())
    check_needs(config)
    data = _data_words(config)
    starting_weights(config)
    command = local_command(path, overrides, num_procs=processes, master_port=29500)
    sections = {
        "plan": _plan_words(config, layout),
        "memory and time": _estimate_words(config, processes),
        "data": data,
        "files": _file_words(config),
        "command": f"toolkit train starts this, with a free port\n{_environment(processes)}{shlex.join(command)}",
    }
    return "\n".join(f"{title}\n{_indented(text)}" for title, text in sections.items()) + "\n"


def _plan_words(config: RunConfig, layout: Layout) -> str:
    t, z = config.train, config.zero
    offloaded = [
        f"{what} on {place}" for what, place in (("optimizer", z.offload_optimizer), ("parameters", z.offload_param)) if place != "none"
    ]
    degrees = f"tp {layout.tp} · pp {layout.pp} · vpp {layout.vpp} · cp {layout.cp} · dp {layout.dp}"
    return (
        f"{layout.world_size} process{'' if layout.world_size == 1 else 'es'}: {degrees} · "
        + " · ".join([f"ZeRO-{z.stage}", *offloaded, t.precision, f"recompute {t.recompute}"])
        + f"\n{t.steps} steps of {t.global_batch_size} × {t.seq_length} tokens: "
        + f"{layout.num_microbatches} micro-batches of {layout.micro_batch_size} on each data-parallel rank"
    )


def _estimate_words(config: RunConfig, processes: int) -> str:
    hardware = hardware_here(processes)
    if hardware is None:
        return "not estimated: the catalogue lacks this machine's GPU (toolkit estimate --hardware GPU:N)"
    known = with_vocabulary(config)
    remark = "" if known.model.vocab_size else "model.vocab_size is null and the data is not prepared: sizes count the padding alone\n"
    return remark + estimate_text(known, hardware).rstrip()


def _data_words(config: RunConfig) -> str:
    try:
        data = resolve_data(config, prepare_missing=False)
    except DataError as error:
        if not error.what.endswith("is not prepared"):
            raise
        return f"{config.data.source}, which the run prepares first with tokenizer {config.data.tokenizer}, into {cache_dir_of(config)}"
    return f"{', '.join(data.prefixes)}: {data.tokens:,} tokens in {data.documents:,} documents, {data.vocab_size:,} ids"


def _file_words(config: RunConfig) -> str:
    run, c = config.run.dir, config.checkpoint
    names = (files.CONFIG, files.DS_CONFIG, files.MACHINE, files.METRICS, files.CONSOLE)
    when = f"every {c.every} steps and at the end, {c.keep} kept" if c.every else "none: checkpoint.every is 0"
    return f"{run}{os.sep} {', '.join(names)}\n{checkpoint_folder(config)}{os.sep} checkpoints, {when}"


def _environment(processes: int) -> str:
    changed = {name: value for name, value in rank_environment(processes).items() if os.environ.get(name) != value and name != "PATH"}
    return "".join(f"{name}={shlex.quote(value)} " for name, value in sorted(changed.items()))


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())

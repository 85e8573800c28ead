"""From a checkpoint and data to the config of a run that only evaluates; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.checkpoint.folders import checkpoint_in
from toolkit.checkpoint.manifest import Manifest, read_manifest
from toolkit.cluster.environment import gpu_count
from toolkit.config.load import dump_config, load_config, override_config
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import Member, open_members, prefix_of
from toolkit.data.manifest import load_manifest, manifest_path
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import CheckpointError, DataError, ToolkitError
from toolkit.evaluate.windows import Span
from toolkit.parallel.rules import check, fitting_micro_batch
from toolkit.train.resolve import machine

CONFIG, TASK, RESULT = "config.yaml", "task.json", "result.json"  # in a folder that lasts as long as the command


@dataclass(frozen=True)
class Task:
    """What the ranks are to do. batches: global batches of the data to evaluate."""

    span: Span
    batches: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was asked for, checked as far as it can be before anything is started. whole: whether all
    of the data is evaluated; text_bytes: of its text, None where that is not known.
    """

    checkpoint: Path
    step: int
    config: RunConfig
    processes: int
    task: Task
    whole: bool
    text_bytes: int | None

    def write(self, folder: Path) -> Path:
        """Write what the ranks read; returns the YAML's path."""
        self.config.run.dir = folder / "run"
        (folder / CONFIG).write_text(dump_config(self.config), encoding="utf-8")
        (folder / TASK).write_text(json.dumps(asdict(self.task)), encoding="utf-8")
        return folder / CONFIG


def read(folder: Path) -> tuple[RunConfig, Task]:
    """What Evaluation.write has written."""
    raw = json.loads((folder / TASK).read_text(encoding="utf-8"))
    return load_config(folder / CONFIG), Task(Span(**raw["span"]), raw["batches"])


def resolve_evaluation(
    checkpoint: Path, data: str, overrides: Sequence[str], *, num_procs: int | None, batches: int | None, split: str
) -> Evaluation:
    """Check checkpoint, layout and data, and prepare the data where it is text.

    The checkpoint's own config holds, with the overrides; of it only what trains is left out.
    num_procs: default: this machine's GPUs, or as few as tp, pp and cp need. batches: None for all
    of the data. Raises ToolkitError.
    """
    path = checkpoint_in(checkpoint)
    manifest = read_manifest(path)
    config = _without_training(_configured(manifest, overrides, path=path), path)
    p = config.parallel
    processes = num_procs or gpu_count() or p.tp * p.pp * p.cp
    if (micro := fitting_micro_batch(config, processes, machine=machine())) is not None:
        config.train.micro_batch_size = micro
    layout = check(config, processes, machine=machine())
    member = _data(config, data, manifest, path=path)
    span = Span.of(member, split=split, weights=config.data.split, apart=config.data.document_mask)
    t = config.train
    windows = span.windows(t.seq_length)
    unit = layout.dp * t.micro_batch_size * (layout.pp if layout.vpp > 1 else 1)
    t.global_batch_size = min(t.global_batch_size, -(-windows // unit) * unit)  # little data does not need a whole batch
    there = -(-windows // t.global_batch_size)
    whole = batches is None or batches >= there
    manifested = member.manifest if whole and split == "all" else None
    return Evaluation(
        checkpoint=path,
        step=manifest.step,
        config=config,
        processes=processes,
        task=Task(span, there if batches is None else min(batches, there)),
        whole=whole,
        text_bytes=manifested.bytes if manifested else None,
    )


def _configured(manifest: Manifest, overrides: Sequence[str], *, path: Path) -> RunConfig:
    try:
        return override_config(manifest.config, overrides)
    except ToolkitError:
        raise
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has a config that this version cannot read", why=str(error), fix="Use another checkpoint.") from None


def _without_training(config: RunConfig, path: Path) -> RunConfig:
    """The same model on the same layout, without what takes steps, saves and reports."""
    config = config.model_copy(deep=True)
    t, o, c = config.train, config.optimizer, config.checkpoint
    t.steps, t.eval_every, t.eval_steps = 1, 0, 0
    o.warmup_steps, o.decay_steps = 0, None
    c.dir, c.every, c.resume, c.init_from = None, 0, "never", path.absolute()
    config.log.tensorboard = config.log.wandb = config.log.csv = False
    config.model.compile = False  # compiling takes longer than it saves
    if config.zero.offload_param == "none":
        config.zero.offload_optimizer = "none"
    return config


def _data(config: RunConfig, data: str, manifest: Manifest, *, path: Path) -> Member:
    """The data, with ids that mean to the model what they meant in training. Raises DataError."""
    known = manifest.identity.get("data.tokenizer")
    config.data.blend, config.data.source = None, data
    if config.data.cache_dir is None:
        beside = config.run.dir if config.run.dir.exists() else path.absolute()
        config.data.cache_dir = beside.parent / "data"
    if (prefix := prefix_of(data)) is None:
        config.data.tokenizer = _tokenizer(config.data.tokenizer, manifest, path=path)
    elif manifest_path(prefix).exists():
        made = load_manifest(prefix).tokenizer
        theirs = known or _hash_of(config.data.tokenizer, path=path)
        if theirs is not None and made.hash != theirs:
            raise DataError(
                f"{data} was made with tokenizer {made.spec} ({made.vocab_size:,} ids), "
                f"and {path} was trained with {config.data.tokenizer} ({config.model.vocab_size:,} ids)",
                why="an id would mean other text to the model",
                fix="Name the text itself, which is then tokenized as in training.",
            )
    member = open_members(config, prepare_missing=True)[0]
    if known is not None and member.manifest is not None and member.manifest.tokenizer.hash != known:
        raise DataError(
            f"data.tokenizer={config.data.tokenizer} is not the tokenizer that {path} was trained with",
            why="an id would mean other text to the model",
            fix="Set data.tokenizer to the tokenizer.json of its training data.",
        )
    assert config.model.vocab_size is not None
    if member.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{data} has ids up to {member.vocab_size - 1:,}, and the model of {path} knows {config.model.vocab_size:,}",
            why="it was made with another tokenizer",
            fix="Name the text itself, which is then tokenized as in training.",
        )
    config.data.source = member.prefix
    return member


def _tokenizer(spec: str, manifest: Manifest, *, path: Path) -> str:
    """What tokenizes new text as the training data was: for a tokenizer that was learned from that
    data, or that moved with the weights, its file.
    """
    if not spec.startswith("train:"):
        own = path / "tokenizer.json"
        return str(own) if spec != "bytes" and own.exists() and not Path(spec).expanduser().exists() else spec
    try:
        trained = override_config(manifest.config, ())
        prefix = open_members(trained, prepare_missing=False)[0].prefix
        record = load_manifest(prefix).tokenizer
    except ToolkitError:
        record = None
    if record is None or record.file is None:
        raise DataError(
            f"the tokenizer of {path} is {spec}, and the data that it was learned from is not here",
            why="text would be cut into other ids",
            fix="Set data.tokenizer=PREFIX.tokenizer.json, which lies beside the prepared training data.",
        )
    return str(manifest_path(prefix).with_name(record.file))


def _hash_of(spec: str, *, path: Path) -> str | None:
    """The hash of a tokenizer that can be looked at here; None for others."""
    own = path / "tokenizer.json"
    place = Path(spec).expanduser()
    if spec != "bytes" and not place.exists():
        spec = str(own) if own.exists() else ""
    return load_tokenizer(spec).hash if spec else None

"""Which checkpoint a run goes on from: found by rank 0, read through by all ranks, decided together."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from toolkit.checkpoint.claim import checkpoint_folder
from toolkit.checkpoint.identity import changed_keys, check_same_run, check_same_states, identity_of, layout_of, moved
from toolkit.checkpoint.manifest import CheckpointFolder, Manifest, discover, verify_files
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import PreparedData
from toolkit.data.given import GivenData, Samples
from toolkit.errors import CheckpointError, ToolkitError
from toolkit.files import FileRecord
from toolkit.parallel.agree import everywhere, on_rank_0
from toolkit.parallel.layout import Layout

log = logging.getLogger("toolkit.train")

_PROBES = 4


@dataclass(frozen=True)
class Resume:
    """Where a run starts. path, manifest: the checkpoint it goes on from, None for a fresh start;
    distrusted: damaged ones passed over.
    """

    path: Path | None = None
    manifest: Manifest | None = None
    distrusted: frozenset[str] = field(default_factory=frozenset)

    @property
    def step(self) -> int:
        return self.manifest.step if self.manifest else 0

    @property
    def consumed_samples(self) -> int:
        return self.manifest.consumed_samples if self.manifest else 0


def find(config: RunConfig, layout: Layout, data: PreparedData | GivenData) -> Resume:
    """The newest checkpoint whose every byte is as it was written; all ranks call it and get the same.

    auto: damaged ones are named and passed over, none at all is a fresh start; must: the newest
    must be good; never: there must be none. Raises CheckpointError; nothing is deleted.
    """
    policy, folder = config.checkpoint.resume, checkpoint_folder(config)
    candidates: list[CheckpointFolder] = on_rank_0(lambda: discover(folder)) or []
    if policy == "never":
        on_rank_0(lambda: _refuse_existing(candidates, folder))
        return Resume()
    identity, cut = identity_of(config, data), layout_of(config, layout)
    distrusted: dict[str, str] = {}
    # only rank 0 has candidates; the others take part in reading them
    for one in _rounds(candidates):
        found = everywhere(lambda: one)[0]  # noqa: B023  called at once
        if found is None:
            break
        if not found.finished:
            _say("%s was not finished; passed over", found.path)
            continue
        problem = found.problem
        if found.manifest is not None:
            manifest, path = found.manifest, found.path
            on_rank_0(lambda: _check(manifest, path, identity, config))  # noqa: B023
            problem = next(filter(None, everywhere(lambda: verify_files(path, _share(manifest.files)))), "")  # noqa: B023
            if not problem:
                return _announce(Resume(path, manifest, frozenset(distrusted)), config, cut)
        if policy == "must":
            raise CheckpointError(
                f"the newest checkpoint cannot be used: {problem}",
                why="checkpoint.resume=must goes on from no other",
                fix="Restore the file, or set checkpoint.resume=auto to go on from an older checkpoint.",
            )
        distrusted[found.path.name] = problem
        if dist.get_rank() == 0:
            log.warning("%s; looking for an older checkpoint", problem)
    if distrusted:
        raise CheckpointError(
            f"none of the {len(distrusted)} checkpoints in {folder} can be used: {'; '.join(distrusted.values())}",
            why="starting over would end in writing over what may still be rescued",
            fix="Restore the files, or move the folder away to start at step 1.",
        )
    if policy == "must":
        raise CheckpointError(
            f"{folder} holds no complete checkpoint",
            why="checkpoint.resume=must never starts over",
            fix="Set checkpoint.dir to where one is, or checkpoint.resume=auto to start at step 1.",
        )
    if config.checkpoint.every:
        _say("no checkpoint in %s: starting at step 1", folder)
    return Resume()


def probe(dataset: Any, *, consumed_samples: int) -> dict[str, Any]:
    """A digest of a few samples, spread over those already trained on: it changes when the order of
    the data does.
    """
    last = consumed_samples - 1
    ids = sorted({last * i // (_PROBES - 1) for i in range(_PROBES)})
    digest = hashlib.sha256()
    for i in ids:
        sample = dataset[i]
        if isinstance(sample, ToolkitError):
            raise sample
        for name in ("text",) if "text" in sample else ("tokens", "labels"):
            digest.update(sample[name].astype("int64").tobytes())
    return {"samples": ids, "sha256": digest.hexdigest()}


def check_probe(resume: Resume, dataset: Any, config: RunConfig) -> None:
    """All ranks call it: CheckpointError where this run's data set no longer has the samples
    already trained on in their places.
    """
    if resume.manifest is None:
        return
    manifest = resume.manifest

    def check() -> None:
        if probe(dataset, consumed_samples=manifest.consumed_samples) == manifest.probe:
            return
        if isinstance(dataset, Samples):
            raise CheckpointError(
                f"the samples are not those that {resume.path} was trained on",
                why="going on would repeat some and leave out others: the data set given gives others now, or in another order",
                fix="Give the data set as it was, or set another run.dir.",
            )
        steps = manifest.config.get("train", {}).get("steps")
        raise CheckpointError(
            f"the order of the samples is not that of {resume.path}",
            why="going on would repeat some samples and leave out others: the data is shuffled over all passes that train.steps takes"
            if steps != config.train.steps
            else f"the data set is built differently now (the checkpoint's versions: {_versions(manifest.versions)})",
            fix=f"Set train.steps={steps}, as it was." if steps != config.train.steps else "Use the versions the run was started with.",
        )

    on_rank_0(check)


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in versions.items())


def _rounds(candidates: list[CheckpointFolder]) -> Any:
    """Rank 0's candidates and then None; on other ranks None for ever, as they hear from rank 0."""
    if dist.get_rank() == 0:
        yield from candidates
        yield None
    while True:
        yield None


def _share(files: list[FileRecord]) -> list[FileRecord]:
    return files[dist.get_rank() :: dist.get_world_size()]


def _check(manifest: Manifest, path: Path, identity: Mapping[str, Any], config: RunConfig) -> None:
    if manifest.weights_only:
        raise CheckpointError(
            f"{path} holds weights without optimizer states",
            why="a run can start from them, but not go on",
            fix="Move it out of the run's folder, and set checkpoint.init_from to it.",
        )
    check_same_run(manifest, identity, path=path)
    check_same_states(manifest, config, path=path)


def _refuse_existing(candidates: list[CheckpointFolder], folder: Path) -> None:
    finished = [c for c in candidates if c.finished]
    if finished:
        raise CheckpointError(
            f"checkpoint.resume=never, and {folder} holds {len(finished)} checkpoints (newest: {finished[0].path.name})",
            why="starting over there would mix two runs",
            fix="Set another run.dir, move the folder away, or set checkpoint.resume=auto to go on.",
        )


def _announce(resume: Resume, config: RunConfig, cut: Mapping[str, Any]) -> Resume:
    assert resume.manifest is not None
    _say("resuming from %s: step %d, %d samples", resume.path, resume.step, resume.consumed_samples)
    if difference := moved(resume.manifest, cut):
        _say("%s: resharding on the fly", difference)
    for line in changed_keys(resume.manifest, config):
        _say("changed since then: %s", line)
    return resume


def _say(text: str, *values: Any) -> None:
    if dist.get_rank() == 0:
        log.info(text, *values)

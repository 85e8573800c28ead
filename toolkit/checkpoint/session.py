"""A run's dealings with checkpoints, as the training loop sees them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from toolkit.checkpoint.claim import check_shared, checkpoint_folder, claim
from toolkit.checkpoint.identity import identity_of, layout_of
from toolkit.checkpoint.load import load_weights, restore
from toolkit.checkpoint.manifest import Manifest, folder_name, verify_files
from toolkit.checkpoint.resume import Resume, check_probe, find, probe
from toolkit.checkpoint.save import Saver, SaveSettings
from toolkit.checkpoint.start import announce
from toolkit.config.deepspeed import zero_key
from toolkit.config.load import saved_config
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import PreparedData
from toolkit.data.given import GivenData
from toolkit.engine.state import EngineState
from toolkit.errors import CheckpointError, ConfigError
from toolkit.parallel.agree import everywhere, on_rank_0
from toolkit.parallel.layout import Layout
from toolkit.runfolder.metrics import StepRecord

log = logging.getLogger("toolkit.train")


class Checkpoints:
    """Locks the run's folders, finds where to go on, and saves at step boundaries. Every rank makes
    one and calls it alike.

    weights: what starting_weights() found for this config.
    """

    def __init__(
        self, config: RunConfig, layout: Layout, data: PreparedData | GivenData, *, weights: tuple[Path, Manifest] | None = None
    ) -> None:
        self.config, self.layout, self.data = config, layout, data
        c = config.checkpoint
        if c.every and zero_key(config, "offload_optimizer", {}).get("super_offload"):
            raise ConfigError(
                "checkpoint.every > 0 with super_offload in the DeepSpeed JSON",
                why="its optimizer states live in a process of its own, and no run has proven that they come back",
                fix="Leave super_offload out, or set checkpoint.every=0.",
            )
        self.saver: Saver | None = None
        self.claim = on_rank_0(lambda: claim(config, will_save=c.every > 0))
        self.token = everywhere(lambda: self.claim.token if self.claim else "")[0]
        if c.every:
            proof = everywhere(lambda: self.claim.proof if self.claim else None)[0]
            everywhere(lambda: check_shared(proof) if proof and self.claim is None else None)
        try:
            self.resume: Resume = find(config, layout, data)
            self.weights = self._verified(weights)
        except BaseException:
            self.release()
            raise

    def _verified(self, weights: tuple[Path, Manifest] | None) -> Path | None:
        """Where checkpoint.init_from's weights lie, each of its files held to its checksum by some
        rank; None where there is nothing to read.
        """
        init_from = self.config.checkpoint.init_from
        if init_from is None or self.resume.path is not None:
            if init_from is not None and dist.get_rank() == 0:
                log.info("checkpoint.init_from=%s is not read: this run goes on from its own checkpoint", init_from)
            return None
        found = everywhere(lambda: weights)[0]  # hosts may see the folder differently; rank 0's answer counts
        assert found is not None, "the run has nothing to resume from"
        path, manifest = found
        share = manifest.files[dist.get_rank() :: dist.get_world_size()]
        if problem := next(filter(None, everywhere(lambda: verify_files(path, share))), ""):
            raise CheckpointError(
                f"checkpoint.init_from={init_from} cannot be used: {problem}", fix="Restore the file, or name another one."
            )
        if dist.get_rank() == 0:
            announce(path, manifest, self.config)
        return path

    @property
    def step(self) -> int:
        """Optimizer steps already taken."""
        return self.resume.step

    @property
    def consumed_samples(self) -> int:
        return self.resume.consumed_samples

    def attach(self, engine: Any, train_set: Any) -> None:
        """Give a new engine the state to go on from, and make ready to save it."""
        check_probe(self.resume, train_set, self.config)
        state = EngineState(engine)
        if self.weights is not None:
            load_weights(self.weights, state, self.layout)
        restore(self.resume, state, self.config, self.layout)
        if self.step >= self.config.train.steps and dist.get_rank() == 0:
            log.info("nothing left to do: step %d of %d is reached", self.step, self.config.train.steps)
        if not self.config.checkpoint.every:
            return
        self.train_set = train_set
        settings = SaveSettings(
            folder=checkpoint_folder(self.config),
            token=self.token,
            keep=self.config.checkpoint.keep,
            distrusted=self.resume.distrusted,
            facts={
                "layout": layout_of(self.config, self.layout),
                "identity": identity_of(self.config, self.data),
                "config": saved_config(self.config),
            },
        )
        self.saver = Saver(self.config, self.layout, state, settings)

    def save(self, record: StepRecord, *, last: bool) -> bool:
        """Save after a step where it is due, noting the pause in its record; commit() must follow
        once the record is on disk.
        """
        if self.saver is None:
            return False
        due = last or record.step % self.config.checkpoint.every == 0
        if due:
            samples = record.step * self.config.train.global_batch_size
            if isinstance(self.data, GivenData):  # the user's code reads the samples, and may fail on rank 0 alone
                facts = on_rank_0(lambda: probe(self.train_set, consumed_samples=samples)) or {}
            else:
                facts = probe(self.train_set, consumed_samples=samples) if dist.get_rank() == 0 else {}
            record.save_pause_s = self.saver.save(record.step, probe=facts)
        record.save_write_s = self.saver.write_seconds()
        return due

    def commit(self) -> None:
        """Let the last save count."""
        if self.saver is not None:
            self.saver.commit()

    def newest(self, step: int) -> Path | None:
        """The checkpoint that a run leaves which ends after a step of its own (0: it has taken
        none); None without one.
        """
        if step and self.saver is not None:
            return checkpoint_folder(self.config) / folder_name(step)
        return self.resume.path

    @property
    def failed(self) -> bool:
        """Whether saving went wrong on this rank; when it did on any, all call settle()."""
        return self.saver is not None and self.saver.failed

    def settle(self) -> None:
        """Wait for the save in flight; CheckpointError on all ranks when it failed."""
        if self.saver is not None:
            self.saver.settle()

    def release(self) -> None:
        """Let other runs have the folders."""
        if self.claim is not None:
            self.claim.release()

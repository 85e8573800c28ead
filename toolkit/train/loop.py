"""The training run: from a config to the last step, the same program on one process and on many
hosts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.checkpoint.claim import checkpoint_folder
from toolkit.checkpoint.manifest import folder_name
from toolkit.checkpoint.session import Checkpoints
from toolkit.cluster.environment import hosts
from toolkit.cluster.locks import check_extension_locks
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import build_datasets
from toolkit.data.given import GivenData
from toolkit.errors import DataError, Stopped, ToolkitError, TrainingError
from toolkit.hardware.catalogue import peak_flops
from toolkit.parallel.agree import everywhere
from toolkit.runfolder.files import write_machine, write_ranks, write_run
from toolkit.runfolder.metrics import Metrics, StepRecord
from toolkit.train.bar import Bar
from toolkit.train.console import ConsoleLog
from toolkit.train.feed import Feed, Fetched
from toolkit.train.hooks import Extensions, Hooks
from toolkit.train.lr import learning_rate
from toolkit.train.resolve import ResolvedRun
from toolkit.train.signals import StopRequest
from toolkit.train.sound import check_repeat, check_replicas, slowest
from toolkit.train.watchdog import Party, Progress, Watchdog
from toolkit.train.words import Outcome, closing_lines, opening_lines
from toolkit.train.world import World, connect

log = logging.getLogger("toolkit.train")

NOTHING = Extensions()  # added by the user
MOST_QUIET = 20  # steps that are too few to tell which rank is slow
BY_HOOK, BY_SIGNAL = 1, 2  # who asks for an end of the run; 0: nobody


def train(resolved: ResolvedRun, extensions: Extensions = NOTHING, console: ConsoleLog | None = None) -> StepRecord | None:
    """Take all steps of a run on this rank; returns the last one's record. Raises ToolkitError on
    all ranks alike. console: gets the run's folder once it is this run's own.
    """
    config = resolved.config
    world = World.from_environment()
    check_extension_locks(_extensions(config))
    connect(world, resolved.layout, seed=config.run.seed)
    run = Run(resolved, world, extensions, console)
    try:
        return run.steps()
    finally:
        run.close()


def _extensions(config: RunConfig) -> set[str]:
    """What DeepSpeed will compile for this run, if it has not already."""
    devices = {config.zero.offload_optimizer, config.zero.offload_param}
    names = {"cpu_adam"} if config.zero.offload_optimizer != "none" else set()
    return names | {"async_io"} if "nvme" in devices else names


class Run:
    """One rank's part of a run."""

    def __init__(self, resolved: ResolvedRun, world: World, extensions: Extensions = NOTHING, console: ConsoleLog | None = None) -> None:
        self.stop = StopRequest()
        self.bar: Bar | None = None
        self.evaluated: StepRecord | None = None  # the last step that was
        self.progress = Progress()
        self.watchdog: Watchdog | None = None
        try:
            self._build(resolved, world, extensions, console)
        except BaseException:
            self.stop.close()
            raise

    def _build(self, resolved: ResolvedRun, world: World, extensions: Extensions, console: ConsoleLog | None) -> None:
        from toolkit.engine.loss import Loss
        from toolkit.engine.schedule import Schedule
        from toolkit.engine.zero import Engine, partitioner
        from toolkit.model.build import build_chunks

        config, layout, ds_config = resolved.config, resolved.layout, resolved.ds_config
        self.config, self.layout, self.world = config, layout, world
        self.at = layout.coordinates(world.rank)
        self.started = time.perf_counter()
        self.own_data = isinstance(resolved.data, GivenData)
        self.loss = Loss(extensions.loss, rank=world.rank)
        self.data_error: ToolkitError | None = None
        self.ahead: Fetched | None = None  # the next step's
        if isinstance(resolved.data, GivenData):
            check_together(resolved.data, config)
        self.checkpoints = Checkpoints(config, layout, resolved.data, weights=resolved.weights)
        folder = write_run(config, ds_config) if world.rank == 0 else None
        if console is not None:
            console.open(config.run.dir, step=self.checkpoints.step, processes=world.size)
        train_set, self.valid_set, _ = build_datasets(config, resolved.data)
        self.feed = Feed(resolved, rank=world.rank, device=world.device)
        # readers fork before the model exists: a child then shares little memory that would be copied
        self.train_batches = self.feed.reader(train_set, workers=config.data.workers, consumed=self.checkpoints.consumed_samples)
        blank = self.checkpoints.weights is not None
        chunks = build_chunks(config, layout, device=world.device, partition=partitioner(config, ds_config), blank=blank)
        self.engine = Engine(chunks, config, layout, ds_config, optimizer=extensions.optimizer)
        self.checkpoints.attach(self.engine, train_set)
        t = config.train
        self.schedule = Schedule(self.engine.views, layout, seq_length=t.seq_length, micro_batch_size=t.micro_batch_size, loss=self.loss)
        self.hooks = Hooks(extensions, rank=world.rank, model=chunks)
        monitor = self.engine.monitor.write_events if self.engine.monitor.enabled else None
        self.metrics = Metrics(folder, steps=t.steps, every=config.log.every, monitor=monitor, resumed=self.checkpoints.step)
        self.step_tokens = t.global_batch_size * t.seq_length
        self.flops = config.model.spec.flops_per_token(t.seq_length)
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
        self.device_name = name
        self.peak = peak_flops(name, t.precision)
        if folder is not None:
            write_machine(folder, device=name, processes=world.size, hosts=hosts())
        self.process = psutil.Process()
        if world.rank == 0:
            for line in opening_lines(resolved, device=name, seconds=time.perf_counter() - self.started):
                log.info(line)

    def steps(self) -> StepRecord | None:
        """All optimizer steps, with evaluation where it is due, or those until a signal or a hook
        asks for an end; the last one's record.
        """
        t = self.config.train
        record, stopping = None, 0
        self._watch()
        if self.world.rank == 0:
            self.bar = Bar.on_terminal(steps=t.steps, done=self.checkpoints.step)
        for step in range(self.checkpoints.step + 1, t.steps + 1):
            self.progress.step = step
            record, stopping = self._step(step)
            self.progress.beats += 1
            if t.eval_every and (step % t.eval_every == 0 or step == t.steps):
                record.eval_loss = self._evaluate()
                self.evaluated = record
                self.hooks.call("on_eval", record)
            self._check_repeat(step)
            self.hooks.call("on_step", record)
            saving = self.checkpoints.save(record, last=stopping > 0 or step == t.steps)
            if saving:
                self.hooks.call("on_save", record, checkpoint=checkpoint_folder(self.config) / folder_name(step))
            self.metrics.write(record, durable=saving)
            if self.bar is not None:
                self.bar.step(record, partial(self.metrics.left_s, record))
            if saving:
                self.checkpoints.commit()
            self.progress.beats += 1
            if stopping:
                if self.world.rank == 0:
                    who = "a signal" if stopping == BY_SIGNAL else f"the hook {self.hooks.stop_asked or 'of another rank'}"
                    log.info("stopped after step %d, as %s asked", step, who)
                break
        self._end_together()
        self._close_with_words(record, self._slowest(record))
        if record is not None and stopping == BY_SIGNAL and record.step < t.steps:
            raise Stopped(f"the run was stopped after step {record.step} of {t.steps}", fix="Start it again to go on from its checkpoint.")
        return record

    def _watch(self) -> None:
        """From here on, a run that makes no progress is ended."""
        t = self.config.train
        if t.watchdog_s or t.check_replicas_every or t.check_repeat_every:
            self.party = Party.of(self.config.run.dir)
        if t.watchdog_s:
            self.watchdog = Watchdog(self.progress, self.party, seconds=t.watchdog_s, rank=self.world.rank, layout=self.layout)

    def _check_repeat(self, step: int) -> None:
        """Compute the next step's batch twice where the config asks for it."""
        t = self.config.train
        if t.check_repeat_every and step % t.check_repeat_every == 0 and self.ahead is not None:
            micro = self.ahead[0]
            self.engine.evaluation(True)
            with torch.no_grad():
                check_repeat(
                    lambda: self.schedule(lambda: iter(micro), num_microbatches=len(micro), forward_only=True),
                    self.layout,
                    self.party.hosts,
                    rank=self.world.rank,
                    step=step,
                )
            self.engine.evaluation(False)

    def _slowest(self, record: StepRecord | None) -> str:
        """Who held the others up, once enough steps tell; all ranks call it."""
        taken = record.step - self.checkpoints.step if record else 0
        # on a GPU the host's time says nothing of the device's
        if self.watchdog is None or self.world.size < 2 or taken < MOST_QUIET or self.world.device.type == "cuda":
            return ""
        own = everywhere(lambda: self.watchdog.busy_s / (taken - 1) if self.watchdog else 0.0)
        if self.world.rank == 0:
            write_ranks(self.config.run.dir, own_s=own, hosts=self.party.hosts)
        return slowest(own, self.party.hosts)

    def close(self) -> None:
        """Let go of reading processes, files, folders and the model; no other rank is waited for."""
        if self.watchdog is not None:
            self.watchdog.close()
        if self.train_batches is not None:
            self.train_batches.close()
        self._end_bar()
        self.metrics.close()
        self.checkpoints.release()
        self.stop.close()
        self.engine.close()

    def _close_with_words(self, record: StepRecord | None, slowest: str) -> None:
        if self.world.rank != 0:
            return
        self._end_bar()
        if slowest:
            log.info(slowest)
        outcome = Outcome(
            record=record,
            taken=record.step - self.checkpoints.step if record else 0,
            seconds=time.perf_counter() - self.started,
            tokens_per_s=self.metrics.pace.tokens_per_s(),
            evaluated=self.evaluated,
            checkpoint=self.checkpoints.newest(record.step if record else 0),
            processes=self.world.size,
            hosts=hosts(),
            own_data=self.own_data,
            device=self.device_name,
        )
        for line in closing_lines(self.config, outcome):
            log.info(line)

    def _end_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _step(self, step: int) -> tuple[StepRecord, int]:
        t, started = self.config.train, time.perf_counter()
        micro, error = self.ahead or self.feed.fetch(self.train_batches)
        self.ahead, self.data_error = None, self.data_error or error
        self.feed.weigh(micro)
        waited = time.perf_counter() - started
        lr = learning_rate(self.config.optimizer, step=step - 1, total_steps=t.steps)
        self.engine.set_lr(lr)
        self.engine.begin()
        loss = self.schedule(lambda: iter(micro), num_microbatches=self.layout.num_microbatches)
        if step < t.steps:
            # a GPU is still busy with this step, and the host has not asked for its results yet
            before = time.perf_counter()
            self.ahead = self.feed.fetch(self.train_batches)
            waited += time.perf_counter() - before
        if t.check_replicas_every and step % t.check_replicas_every == 0:
            # before the update, in which ZeRO sends all weights anew
            check_replicas(self.engine.chunks, self.layout, self.party.hosts, step=step)
        scale = self.engine.loss_scale
        norm = self.engine.finish()
        mean_loss, asked, grad_norm, worst_wait, memory = self._agree(loss, norm, waited)
        finite = math.isfinite(mean_loss) and grad_norm >= 0
        if not finite:
            self._not_finite(step, loss, fp16=t.precision == "fp16", scale=scale)
        seconds = time.perf_counter() - started
        rate = self.step_tokens / seconds
        per_gpu = rate * self.flops / self.world.size
        record = StepRecord(
            step=step,
            loss=mean_loss if math.isfinite(mean_loss) else None,
            grad_norm=grad_norm if grad_norm >= 0 else None,
            lr=lr,
            tokens=step * self.step_tokens,
            tokens_per_s=rate,
            tflops_per_gpu=per_gpu / 1e12,
            mfu=per_gpu / self.peak if self.peak else None,
            step_s=seconds,
            data_wait_s=worst_wait,
            memory_gib=memory / 2**30,
            loss_scale=scale if t.precision == "fp16" else None,
            skipped=True if not finite else None,
        )
        return record, asked

    def _agree(self, loss: Tensor | None, norm: Tensor, waited: float) -> tuple[float, int, float, float, float]:
        """What every rank must see alike, in one message: mean loss, who asks for an end, grad
        norm, longest wait, most memory.

        One vector reduced with max carries it all but the loss, which data-parallel ranks average.
        An error that the user's code has made on any rank since the last step, or that a save has
        met, is raised here on all of them.
        """
        device = self.world.device
        used = torch.cuda.max_memory_allocated() if device.type == "cuda" else self.process.memory_info().rss
        mine = loss if loss is not None and self.at.tp == 0 else torch.zeros((), device=device)
        total = mine.detach().reshape(1) / self.layout.copies
        dist.all_reduce(total)
        asks = BY_SIGNAL if self.stop else BY_HOOK if self.hooks.stop_asked is not None else 0
        failed = self.checkpoints.failed or self.error is not None
        worst = torch.tensor([float(asks), waited, float(used), float(failed)], dtype=torch.float64, device=device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        # all in one copy to the host, which waits for the device each time it asks
        mean_loss, grad_norm, asked, wait, memory, any_failed = torch.cat([total.double(), norm.double().reshape(1), worst]).tolist()
        if any_failed:
            self._end_together()
        return mean_loss, int(asked), grad_norm, wait, memory

    @property
    def error(self) -> ToolkitError | None:
        """What the user's data, loss, hooks or disk have done wrong on this rank."""
        return self.data_error or self.loss.error or self.hooks.error or self.metrics.error

    def _end_together(self) -> None:
        """Wait for the save in flight, then raise the first error that any rank has met; all ranks
        call it.
        """
        self.checkpoints.settle()

        def check() -> None:
            if self.error is not None:
                raise self.error

        everywhere(check)

    def _not_finite(self, step: int, loss: Tensor | None, *, fp16: bool, scale: float) -> None:
        """All ranks come here together: name the ranks, and stop or go on as configured."""
        bad_loss = loss is not None and not bool(loss.isfinite())
        bad_gradient = not bool(self.engine.local_square_sum.isfinite())
        flags = torch.tensor([int(bad_loss), int(bad_gradient)], device=self.world.device)
        everyone = [torch.zeros_like(flags) for _ in range(self.world.size)]
        dist.all_gather(everyone, flags)
        losses = [r for r, f in enumerate(everyone) if f[0]]
        gradients = [r for r, f in enumerate(everyone) if f[1]]
        where = f"loss on rank {_ranks(losses)}" if losses else f"gradient on rank {_ranks(gradients)}"
        if fp16 and scale > 1.0:
            if self.world.rank == 0:
                log.info("step %d skipped: %s is not finite at loss scale %g; the scale falls", step, where, scale)
            return
        if self.config.train.on_nonfinite == "skip":
            if self.world.rank == 0:
                log.warning("step %d skipped: %s is not finite", step, where)
            return
        raise TrainingError(
            f"step {step}: {where} is not finite",
            why="the update was not applied, and train.on_nonfinite=stop ends the run here",
            fix="Lower optimizer.lr or set optimizer.warmup_steps; train.on_nonfinite=skip passes over such steps.",
        )

    def _evaluate(self) -> float:
        """Mean loss over eval_steps global batches of the validation split, the same ones every
        time.
        """
        return self.evaluate(self.valid_set, batches=self.config.train.eval_steps)

    def evaluate(self, dataset: Any, *, batches: int, told: Callable[[int], None] = lambda batch: None) -> float:
        """Mean loss over the first global batches of a data set; all ranks call it. told: called with
        the number of each batch that has been given to the device.
        """
        reader = self.feed.reader(dataset, workers=0)
        self.engine.evaluation(True)
        # losses, and how many ranks have met an error; fp64 for sums over many batches
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with torch.no_grad():
            for batch in range(1, batches + 1):
                micro, error = self.feed.fetch(reader)
                self.data_error = self.data_error or error
                self.feed.weigh(micro)
                loss = self.schedule(lambda: iter(micro), num_microbatches=len(micro), forward_only=True)  # noqa: B023
                if loss is not None and self.at.tp == 0:
                    total[0] += loss
                told(batch)
                self.progress.beats += 1
        self.engine.evaluation(False)
        if reader is not None:
            reader.close()
        total[1] = float(self.error is not None)
        dist.all_reduce(total)
        losses, errors = total.tolist()
        if errors:
            self._end_together()
        return float(losses / (batches * self.layout.copies))


def check_together(data: GivenData, config: RunConfig) -> None:
    """Hold the user's data sets to what the run needs; a DataError on any rank, or ranks that see
    different data, end all ranks alike.
    """
    found = everywhere(lambda: data.check(config))
    if other := next((rank for rank, facts in enumerate(found) if facts != found[0]), 0):
        raise DataError(
            f"rank {other} has another data set than rank 0: {found[other][0]} with {found[other][1]:,} samples, not {found[0][0]} with {found[0][1]:,}",
            why="all ranks take their part of the same samples",
            fix="Make the same data set on every rank.",
        )


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")

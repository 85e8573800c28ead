"""The training run: from a config to the last step, the same program on one process and on many hosts."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.checkpoint.session import Checkpoints
from toolkit.cluster.locks import check_extension_locks
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import build_datasets
from toolkit.data.loader import batches
from toolkit.errors import TrainingError
from toolkit.hardware.catalogue import peak_flops
from toolkit.runfolder.files import write_machine, write_run
from toolkit.runfolder.metrics import Metrics, StepRecord
from toolkit.train.lr import learning_rate
from toolkit.train.resolve import ResolvedRun
from toolkit.train.signals import StopRequest
from toolkit.train.world import World, connect

log = logging.getLogger("toolkit.train")

Batch = dict[str, Tensor]


def train(resolved: ResolvedRun) -> None:
    """Take all steps of a run on this rank; raises ToolkitError on all ranks alike."""
    config = resolved.config
    world = World.from_environment()
    check_extension_locks(_extensions(config))
    connect(world, resolved.layout, seed=config.run.seed)
    try:
        Run(resolved, world).steps()
    finally:
        dist.destroy_process_group()


def _extensions(config: RunConfig) -> set[str]:
    """What DeepSpeed will compile for this run, if it has not already."""
    devices = {config.zero.offload_optimizer, config.zero.offload_param}
    names = {"cpu_adam"} if config.zero.offload_optimizer != "none" else set()
    return names | {"async_io"} if "nvme" in devices else names


class Run:
    """One rank's part of a run."""

    def __init__(self, resolved: ResolvedRun, world: World) -> None:
        from toolkit.engine.schedule import Schedule
        from toolkit.engine.zero import Engine, partitioner
        from toolkit.model.build import build_chunks

        config, layout, ds_config = resolved.config, resolved.layout, resolved.ds_config
        self.config, self.layout, self.world = config, layout, world
        self.at = layout.coordinates(world.rank)
        self.stop = StopRequest()
        started = time.perf_counter()
        self.checkpoints = Checkpoints(config, layout, resolved.data, weights=resolved.weights)
        folder = write_run(config, ds_config) if world.rank == 0 else None
        train_set, self.valid_set, _ = build_datasets(config, resolved.data)
        self.reads_data = self.at.pp in (0, layout.pp - 1)
        # readers fork before the model exists: a child then shares little memory that would be copied
        self.train_batches = self._reader(train_set, workers=config.data.workers, consumed=self.checkpoints.consumed_samples)
        blank = self.checkpoints.weights is not None
        chunks = build_chunks(config, layout, device=world.device, partition=partitioner(config, ds_config), blank=blank)
        self.engine = Engine(chunks, config, layout, ds_config)
        self.checkpoints.attach(self.engine, train_set)
        t = config.train
        self.schedule = Schedule(self.engine.views, layout, seq_length=t.seq_length, micro_batch_size=t.micro_batch_size)
        monitor = self.engine.monitor.write_events if self.engine.monitor.enabled else None
        self.metrics = Metrics(folder, steps=t.steps, every=config.log.every, monitor=monitor, resumed=self.checkpoints.step)
        self.step_tokens = t.global_batch_size * t.seq_length
        self.flops = config.model.spec.flops_per_token(t.seq_length)
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
        self.peak = peak_flops(name, t.precision)
        if folder is not None:
            hosts = int(os.environ.get("CROSS_SIZE", 1))  # as DeepSpeed's launcher counts them
            write_machine(folder, device=name, processes=world.size, hosts=hosts)
        self.process = psutil.Process()
        if world.rank == 0:
            _announce(resolved, device=name, seconds=time.perf_counter() - started)

    def steps(self) -> None:
        """All optimizer steps, with evaluation where it is due; returns early once a signal has asked for it."""
        t = self.config.train
        for step in range(self.checkpoints.step + 1, t.steps + 1):
            record, stopping = self._step(step)
            if t.eval_every and (step % t.eval_every == 0 or step == t.steps):
                record.eval_loss = self._evaluate()
            saving = self.checkpoints.save(record, last=stopping or step == t.steps)
            self.metrics.write(record, durable=saving)
            if saving:
                self.checkpoints.commit()
            if stopping:
                if self.world.rank == 0:
                    log.info("stopped after step %d, as a signal asked", step)
                break
        self.checkpoints.settle()
        self.checkpoints.release()
        self.metrics.close()
        if self.train_batches is not None:
            self.train_batches.close()

    def _step(self, step: int) -> tuple[StepRecord, bool]:
        t, started = self.config.train, time.perf_counter()
        micro = [self._next() for _ in range(self.layout.num_microbatches)]
        waited = time.perf_counter() - started
        lr = learning_rate(self.config.optimizer, step=step - 1, total_steps=t.steps)
        self.engine.set_lr(lr)
        self.engine.begin()
        loss = self.schedule(lambda: iter(micro), num_microbatches=self.layout.num_microbatches)
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

    def _agree(self, loss: Tensor | None, norm: Tensor, waited: float) -> tuple[float, bool, float, float, float]:
        """What every rank must see alike, in one message: mean loss, stop asked, grad norm, longest wait, most memory.

        One vector reduced with max carries it all but the loss, which data-parallel ranks average.
        """
        device = self.world.device
        used = torch.cuda.max_memory_allocated() if device.type == "cuda" else self.process.memory_info().rss
        mine = loss if loss is not None and self.at.tp == 0 else torch.zeros((), device=device)
        total = mine.detach().reshape(1) / self.layout.dp
        dist.all_reduce(total)
        worst = torch.tensor(
            [float(bool(self.stop)), waited, float(used), float(self.checkpoints.failed)], dtype=torch.float64, device=device
        )
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        asked, wait, memory, failed = worst.tolist()
        if failed:
            self.checkpoints.settle()
        return float(total), asked > 0, float(norm), wait, memory

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
        """Mean loss over eval_steps global batches of the validation split, the same ones every time."""
        t = self.config.train
        reader = self._reader(self.valid_set, workers=0)
        self.engine.evaluation(True)
        total = torch.zeros(1, device=self.world.device)
        with torch.no_grad():
            for _ in range(t.eval_steps):
                micro = [self._next(reader) for _ in range(self.layout.num_microbatches)]
                loss = self.schedule(lambda: iter(micro), num_microbatches=len(micro), forward_only=True)  # noqa: B023
                if loss is not None and self.at.tp == 0:
                    total += loss
        self.engine.evaluation(False)
        if reader is not None:
            reader.close()
        dist.all_reduce(total)
        return float(total) / (t.eval_steps * self.layout.dp)

    def _reader(self, dataset: Any, *, workers: int, consumed: int = 0) -> Any:
        """Micro-batches for this data-parallel rank; None on stages that neither embed nor compute a loss."""
        if not self.reads_data:
            return None
        return batches(
            dataset,
            layout=self.layout,
            dp_rank=self.at.dp,
            global_batch_size=self.config.train.global_batch_size,
            consumed_samples=consumed,
            workers=workers,
            seed=self.config.run.seed,
        )

    def _next(self, reader: Iterator[Batch] | None = None) -> Batch:
        reader = reader or self.train_batches
        if reader is None:
            shape = (self.config.train.micro_batch_size, self.config.train.seq_length)
            nothing = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
            return {"tokens": nothing, "labels": nothing}
        batch = next(reader)
        if self.world.device.type == "cuda":
            batch = {k: v.to(self.world.device, non_blocking=True) for k, v in batch.items()}
        return batch


def _announce(resolved: ResolvedRun, *, device: str, seconds: float) -> None:
    config, layout, data = resolved.config, resolved.layout, resolved.data
    m, z, t = config.model, config.zero, config.train
    offload = "".join(
        f", {what} on {where}" for what, where in (("optimizer", z.offload_optimizer), ("parameters", z.offload_param)) if where != "none"
    )
    log.info(
        "%s, %s parameters | tp %d pp %d vpp %d dp %d%s | ZeRO-%d%s | %s | %d sequences of %d tokens a step, %d micro-batches of %d | %s",
        m.preset or m.family,
        f"{m.spec.unpadded_parameters:,}",
        layout.tp,
        layout.pp,
        layout.vpp,
        layout.dp,
        " sp" if layout.sequence_parallel else "",
        z.stage,
        offload,
        t.precision,
        t.global_batch_size,
        t.seq_length,
        layout.num_microbatches,
        t.micro_batch_size,
        device,
    )
    log.info("data: %s tokens, unigram entropy %.3f nats | ready in %.1f s", f"{data.tokens:,}", data.entropy, seconds)


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")

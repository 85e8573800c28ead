"""The DeepSpeed engine: the one file that imports deepspeed, and all that it needs to run under a schedule.

What its optimizers hold is read through deepspeed_state.py, which alone knows its private attributes.

Facts about DeepSpeed 0.19 that the code answers are numbered as in docs/design.md.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import: DeepSpeed looks once

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from megatron.core import parallel_state as state

from toolkit.config.schema import RunConfig
from toolkit.engine.deepspeed_state import DeepSpeedState
from toolkit.engine.flat import FlatGradients, Groups, add_within_product
from toolkit.engine.grads import counts_in_norm, global_norm, hook_sum_over_tp, partial_over_tp, square_sum, sum_over_tp, sum_tied
from toolkit.engine.muon import Ranks
from toolkit.engine.optimizers import OptimizerFactory, ParameterGroup, make_optimizer, note_parts, parameter_groups, plugged_in
from toolkit.engine.schedule import ChunkView
from toolkit.parallel.groups import Mpu
from toolkit.parallel.layout import Layout

deepspeed_logger.setLevel(logging.WARNING)
# an operator for inference only; asking for it runs gcc to probe for every extension, and builds it on a CPU
deepspeed_comm: Any = importlib.import_module("deepspeed.comm.torch")  # by name: attribute access would return the torch package
deepspeed_comm.build_shm_op = lambda: None
if not torch.cuda.is_available():
    # PyTorch computes in fp16 on any CPU; DeepSpeed allows it only where the CPU does so fast
    get_accelerator().is_fp16_supported = lambda: True


class Chunks(torch.nn.Module):
    """The stage's chunks as one module, so that one engine holds them all."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Any:
        return self.chunks[index](*args, **kwargs)


def partitioner(config: RunConfig, ds_config: dict[str, Any], *, trains: bool = True) -> Callable[[torch.nn.Parameter], None] | None:
    """What frees all but a rank's part of each new parameter (ZeRO-3), None for lower stages.

    In training, offload to NVMe swaps through the engine's own buffers, so there the engine partitions.
    """
    if config.zero.stage < 3 or (trains and config.zero.offload_param == "nvme"):
        return None
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)  # else Init takes the world for one process
    os.environ.setdefault("LOCAL_RANK", "0")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    context = Init(data_parallel_group=Mpu().get_data_parallel_group(), config_dict_or_path=dict(ds_config), dtype=dtype, mpu=Mpu())

    def partition(parameter: torch.nn.Parameter) -> None:
        context._convert_to_zero_parameters([parameter])

    return partition


def bring_weights(module: torch.nn.Module, ds_config: dict[str, Any], *, whole: type[torch.nn.Module]) -> Any:
    """Have ZeRO-3 bring the weights of each `whole` module as it is called; the engine, to be kept.

    Without an optimizer DeepSpeed makes of it what it calls ZeRO-Inference.
    """
    set_z3_leaf_modules(module, [whole])
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None  # fact 3
    return deepspeed.initialize(model=module, config=ds_config, mpu=Mpu(), dist_init_required=False)[0]


class Engine:
    """A DeepSpeed engine around the chunks of one stage, driven by a schedule instead of by itself.

    Use: begin(); schedule over self.views; finish() -> global gradient norm (fp32 scalar tensor,
    before clipping; -1 where a gradient was not finite and the step was skipped).

    optimizer: makes the optimizer in the place of optimizer.name's, see toolkit.engine.optimizers.plugged_in.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        config: RunConfig,
        layout: Layout,
        ds_config: dict[str, Any],
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        self.config, self.layout, self.stage = config, layout, config.zero.stage
        self.plugged_in = optimizer is not None
        self.chunks = list(chunks)
        self.tp_rank = state.get_tensor_model_parallel_rank()
        self.device = _device()
        self.local_square_sum = torch.zeros((), device=self.device)
        self.module = Chunks(self.chunks)
        self.tied = _tied_weight(self.chunks) if layout.pp > 1 and config.model.tie_embeddings else None
        self.groups = Groups(
            data=Mpu().get_data_parallel_group(),
            tensor=state.get_tensor_model_parallel_group(),
            embedding=state.get_embedding_group() if self.tied is not None else None,
        )
        offloaded = config.zero.offload_optimizer != "none"
        self.flat_path = self.stage <= 1 and not offloaded
        self.schedule_drives_module = self.stage <= 1
        mpu = Mpu(alone=self.stage == 0)
        ranks = Ranks(tensor=self.groups.tensor, data=mpu.get_data_parallel_group())
        groups = parameter_groups(self.chunks, config, tied=self.tied)
        if optimizer is not None:
            inner = plugged_in(optimizer, groups, config, tp=layout.tp, rank=dist.get_rank())
        elif offloaded:
            inner = _cpu_adam(groups, config)
        else:
            inner = make_optimizer(groups, config, ranks=ranks)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=inner,
            config=_engine_config(
                ds_config,
                stage=self.stage,
                schedule_drives_module=self.schedule_drives_module,
                flat=self.flat_path,
                precision=config.train.precision,
            ),
            mpu=mpu,
            dist_init_required=False,
        )
        if self.stage < 3:
            note_parts(DeepSpeedState(self), self.chunks, config.model.spec)
        self.flat: list[FlatGradients] = []
        if self.flat_path:
            self._use_flat_gradients()
        elif self.stage >= 2:
            self._follow_schedule()
            hook_sum_over_tp(partial_over_tp(self.module.parameters()) if layout.tp > 1 else [], self.groups.tensor)
        if self.stage < 3:
            self.optimizer.scaled_global_norm = self._norm
        else:
            self.optimizer._get_norm_groups = lambda: [self._norm()]
        # skip DeepSpeed's overflow scan: a non-finite norm already marks the step
        self.optimizer.check_overflow = lambda partition_gradients=True: None
        self.views = [ChunkView(chunk, self._caller(i)) for i, chunk in enumerate(self.chunks)]
        for chunk in self.chunks:
            chunk.config.grad_scale_func = self._scale if config.train.precision == "fp16" else None

    # -- one step ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a step: gradients are empty."""
        for flat in self.flat:
            flat.attach()

    def finish(self) -> Tensor:
        """Reduce what is left to reduce, clip, update; returns the global gradient norm."""
        if self.flat_path:
            for i, flat in enumerate(self.flat):
                self.optimizer.averaged_gradients[i] = flat.slices(flat.reduce(), self.optimizer.params_in_partition[i])
        elif self.schedule_drives_module:
            self._reduce_gradients()
            self.engine._backward_epilogue()
        self.engine.step()
        if self.layout.vpp > 1:
            self._forget_gradients()
        skipped = bool(self.optimizer.overflow)
        norm = -1.0 if skipped else self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device).reshape(())

    def set_lr(self, lr: float) -> None:
        """Learning rate of the coming step, in every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def loss_scale(self) -> float:
        """fp16's current loss scale; 1 for other precisions."""
        return float(self.optimizer.loss_scale) if self.config.train.precision == "fp16" else 1.0

    @property
    def monitor(self) -> Any:
        """DeepSpeed's monitor (TensorBoard, W&B, CSV); write_events([(name, value, step)])."""
        return self.engine.monitor

    def evaluation(self, on: bool) -> None:
        """Switch dropout off for evaluation, and on again."""
        self.module.train(not on)

    def close(self) -> None:
        """Let go of the model and its state; the engine and its chunks cannot be used afterwards.

        PyTorch's C++ side holds parameters too: Python never collects the cycles of DeepSpeed's hooks.
        """
        held = [m for chunk in self.chunks for m in chunk.modules()] + [self]
        if "engine" in vars(self):  # else it was cut off in the making
            self.engine.destroy()
            held += [self.optimizer, self.engine]
        for one in held:
            vars(one).clear()
        _forget_groups()

    # -- ZeRO-0 and ZeRO-1: flat gradients, reduced once (fact 11) ------------------------------------

    def _use_flat_gradients(self) -> None:
        o = self.optimizer
        group, dp = o.dp_process_group, dist.get_world_size(o.dp_process_group)
        for i, parameters in enumerate(o.bit16_groups):
            flat = o.bit16_groups_flat[i]
            self.flat.append(FlatGradients(parameters, self.groups, flat=flat, partitions=dp, tied=self.tied))
            if flat.dtype == torch.float32:
                # the fp32 "master" copy is the parameter itself: no second copy in memory, none per step
                o.single_partition_of_fp32_groups[i].data = o.parallel_partitioned_bit16_groups[i][dist.get_rank(group)].detach()
        o._link_all_hp_params()  # DeepSpeed's fragments are views of the first copy, and would keep it for good
        if self.config.train.precision == "fp32" and not self.config.model.compile:
            add_within_product(self.module)

    def _reduce_gradients(self) -> None:
        partial = [p.grad for p in partial_over_tp(self.module.parameters()) if p.grad is not None]
        if partial and self.layout.tp > 1:
            sum_over_tp(partial, self.groups.tensor)
        if self.tied is not None and self.groups.embedding is not None:
            assert self.tied.grad is not None
            sum_tied(self.tied.grad, self.groups.embedding)

    # -- ZeRO-2 and ZeRO-3: every backward goes through the engine (facts 1-3) ------------------------

    def _follow_schedule(self) -> None:
        prologue, finalize = self.engine._backward_prologue, self.optimizer.finalize_gradient_accumulation_boundary

        def before_backward() -> None:
            # fact 2: forward resets the hooks' state, but 1F1B's cool-down runs backwards in a row
            self.optimizer.clear_backward_seen_flag()
            self.engine._manual_backward_expected = True  # fp16: the schedule has scaled the loss
            prologue()

        def at_boundary() -> None:
            if self.stage == 2 and self.optimizer.cpu_offload:
                self._sum_tied_offloaded()
                finalize()
            elif self.stage == 2:
                finalize()
                self._sum_tied_partitions()
            else:
                self._sum_tied_zero3()
                finalize()

        self.engine._backward_prologue = before_backward
        self.optimizer.finalize_gradient_accumulation_boundary = at_boundary
        # fact 3: stages hold different modules, so only the data-parallel group can agree on them
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None

    def _forget_gradients(self) -> None:
        """Fact 7: DeepSpeed overwrites a kept gradient in its first micro-step only, and a chunk whose
        first backward comes later would add to last step's values."""
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        elif self.stage == 2 and self.optimizer.cpu_offload:
            sums = list(self.optimizer.accumulated_grads_in_cpu.values())
            if sums:  # in 16 bits DeepSpeed adds up in a buffer of the GPU, which it makes anew for each step
                torch._foreach_zero_(sums)

    def _sum_tied_partitions(self) -> None:
        """The tied weight is an optimizer group of its own, so both stages cut it alike."""
        if self.tied is None or self.groups.embedding is None:
            return
        for i, group in enumerate(self.optimizer.bit16_groups):
            if group[0] is self.tied:
                for gradient in self.optimizer.averaged_gradients[i]:
                    sum_tied(gradient, self.groups.embedding)

    def _sum_tied_offloaded(self) -> None:
        if self.tied is None or self.groups.embedding is None:
            return
        buffer = self.optimizer.accumulated_grads_in_cpu.get(self.optimizer.get_param_id(self.tied))
        if buffer is not None:
            sum_tied(buffer, self.groups.embedding)

    def _sum_tied_zero3(self) -> None:
        """ZeRO-3 cuts each parameter by itself, so both stages' partitions match."""
        if self.tied is None or self.groups.embedding is None:
            return
        partitions = self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        tied: Any = self.tied
        sum_tied(partitions[tied.ds_id], self.groups.embedding)

    def _caller(self, index: int) -> Callable[..., Tensor]:
        chunk = self.chunks[index]
        if self.schedule_drives_module:
            return chunk

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return self.engine(index, *args, **kwargs) if torch.is_grad_enabled() else self.module(index, *args, **kwargs)

        return forward

    # -- the global norm ---------------------------------------------------------------------------

    def _norm(self) -> Tensor:
        """Global norm of the (scaled) gradients, each value counted once; replaces DeepSpeed's (fact 4)."""
        o = self.optimizer
        groups = o.bit16_groups if self.stage < 3 else o.fp16_groups
        offloaded = o.cpu_offload if self.stage < 3 else o.offload_optimizer
        if offloaded:
            norms = [
                torch.as_tensor(o.norm_for_param_grads[o.get_param_id(p)], dtype=torch.float32, device=self.device)
                for group in groups
                for p in group
                if counts_in_norm(p, tp_rank=self.tp_rank) and o.get_param_id(p) in o.norm_for_param_grads
            ]
            self.local_square_sum = (
                torch.stack([n.reshape(()) for n in norms]).square().sum() if norms else torch.zeros((), device=self.device)
            )
        else:
            gradients = []
            for i, group in enumerate(groups):
                owners = o.params_in_partition[i] if self.stage < 3 else group
                parts = [g for g in o.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
                gradients += [g for g, p in zip(parts, owners, strict=True) if counts_in_norm(p, tp_rank=self.tp_rank)]
            self.local_square_sum = square_sum(gradients, device=self.device)
        if self.stage == 0:
            self.local_square_sum = self.local_square_sum / self.layout.copies  # every rank holds the whole
        norm = global_norm(self.local_square_sum)
        return norm.cpu() if offloaded else norm  # DeepSpeed multiplies gradients in host memory by what follows from it

    def _scale(self, loss: Tensor) -> Tensor:
        return loss * self.optimizer.loss_scale


def release(engine: Any) -> None:
    """Let go of what bring_weights() made."""
    engine.destroy()
    _forget_groups()


def _forget_groups() -> None:
    for name in vars(deepspeed_groups):  # made for this layout, and looked up before a new engine makes its own
        if name in ("mpu", "mesh_device") or name.endswith("_GROUP"):
            setattr(deepspeed_groups, name, None)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _tied_weight(chunks: Sequence[Any]) -> torch.nn.Parameter | None:
    """This rank's copy of a tied embedding, on the first and on the last stage."""
    for chunk in chunks:
        if chunk.pre_process or chunk.post_process:
            return chunk.shared_embedding_or_output_weight()
    return None


def _cpu_adam(groups: list[ParameterGroup], config: RunConfig) -> torch.optim.Optimizer:
    """What updates weights that are offloaded."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    o = config.optimizer
    return DeepSpeedCPUAdam(groups, lr=o.lr, betas=o.betas, eps=o.eps, adamw_mode=o.name == "adamw", fp32_optimizer_states=True)


def _engine_config(ds_config: dict[str, Any], *, stage: int, schedule_drives_module: bool, flat: bool, precision: str) -> dict[str, Any]:
    """The final JSON plus what only this engine decides: who accumulates, and over whom states are cut.

    ZeRO-0 is ZeRO-1 over a group of one. DeepSpeed's own stage 0 returns no norm, drops the other
    tensor-parallel ranks' part of it in bf16/fp16, and accumulates in 16 bits.
    """
    final = dict(ds_config)
    if stage == 0:
        final.pop("train_batch_size", None)
        final["zero_optimization"] = {**final.get("zero_optimization", {}), "stage": 1}
    if schedule_drives_module:
        # it makes DeepSpeed's hooks reduce within backward, again for each of several micro-batches
        final["zero_optimization"] = {**final.get("zero_optimization", {}), "overlap_comm": False}
    if flat:
        # DeepSpeed's hooks set up a bucket of 5e8 elements that flat gradients never use: 1.9 GiB a rank
        final["zero_optimization"] = {**final.get("zero_optimization", {}), "reduce_bucket_size": 1}
    if not schedule_drives_module:
        final["managed_gradient_accumulation"] = False
        if precision != "fp32":
            final["data_types"] = {"grad_accum_dtype": "fp32", **final.get("data_types", {})}
    if precision == "bf16":
        # without it a step with a non-finite gradient is applied
        final["bf16"] = {"check_grad_overflow": True, **final.get("bf16", {})}
    return final

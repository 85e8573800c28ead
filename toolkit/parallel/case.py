"""What the rules look at, as plain integers: cheap to make and to change for searches over layouts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.arch.families import FAMILIES
from toolkit.config.deepspeed import accumulation, partition, zero_key
from toolkit.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts about the machine that rules need, known without torch; the runtime fills them."""

    cuda: bool = False
    transformer_engine: bool = False


NO_GPU = Machine()


@dataclass(slots=True, kw_only=True)
class Case:
    """One config on one number of processes. A search may change attributes in place and ask
    rules.legal() again.
    """

    world: int
    tp: int
    pp: int
    vpp: int
    cp: int
    sp: bool
    micro: int
    batch: int
    seq: int
    positions: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int  # padded rows; where only the tokenizer knows them, the multiple they are padded to
    vocab_known: bool
    rotary: bool
    window: int  # sliding attention window, tokens; 0: none
    te: bool
    rope_scaling: bool
    compile: bool
    recompute: str
    act_offload: bool
    documents: bool  # kept apart
    exchange: str  # parallel.cp_exchange
    dropout: bool
    fp32: bool
    optimizer: str
    stage: int
    opt_offload: str
    param_offload: str
    nvme_path: bool
    accumulation: int  # of the user's DeepSpeed JSON; 0: left open
    hpz: int
    qwz: bool
    qgz: bool
    partial_offload: bool
    swap_buffer: int  # elements of one of DeepSpeed's buffers for parameters on NVMe; 0: filled in
    widest: tuple[int, int]  # elements of the largest weight that TP shares out, and of the largest that it does not
    steps: int
    warmup: int
    decay: int  # 0: null
    schedule: str
    eval_every: int
    eval_steps: int
    has_valid: bool
    cuda: bool
    has_te: bool

    @classmethod
    def of(cls, config: RunConfig, world_size: int, *, machine: Machine = NO_GPU) -> Case:
        """Gather what the rules need from a config."""
        m, p, z, t, o = config.model, config.parallel, config.zero, config.train, config.optimizer
        spec = m.spec
        offload = zero_key(config, "offload_optimizer", {})
        return cls(
            world=world_size,
            tp=p.tp,
            pp=p.pp,
            vpp=p.vpp,
            cp=p.cp,
            sp=p.sequence_parallel,
            micro=t.micro_batch_size,
            batch=t.global_batch_size,
            seq=t.seq_length,
            positions=m.max_position_embeddings,
            layers=m.num_layers,
            heads=spec.heads,
            groups=spec.groups,
            head_dim=spec.head_dim,
            ffn=spec.ffn,
            vocab=spec.rows,
            vocab_known=m.vocab_size is not None,
            rotary=spec.rotary,
            window=m.sliding_window or 0,
            te=m.impl == "te",
            rope_scaling=m.rope_scaling is not None,
            compile=m.compile,
            recompute=t.recompute,
            act_offload=t.offload_activations,
            documents=config.data.document_mask,
            exchange=p.cp_exchange,
            dropout=m.dropout > 0,
            fp32=t.precision == "fp32",
            optimizer=o.name,
            stage=z.stage,
            opt_offload=z.offload_optimizer,
            param_offload=z.offload_param,
            nvme_path=z.nvme_path is not None,
            accumulation=accumulation(config) or 0,
            hpz=int(zero_key(config, "zero_hpz_partition_size", 1)),
            qwz=bool(zero_key(config, "zero_quantized_weights", False) or zero_key(config, "zero_quantized_nontrainable_weights", False)),
            qgz=bool(zero_key(config, "zero_quantized_gradients", False)),
            partial_offload=offload.get("ratio", 1) != 1 or bool(offload.get("super_offload", False)),
            swap_buffer=_elements(zero_key(config, "offload_param", {}).get("buffer_size")),
            widest=spec.largest_weights(),
            steps=t.steps,
            warmup=o.warmup_steps,
            decay=o.decay_steps or 0,
            schedule=o.schedule,
            eval_every=t.eval_every,
            eval_steps=t.eval_steps,
            has_valid=config.data.split[1] > 0,
            cuda=machine.cuda,
            has_te=machine.transformer_engine,
        )

    @property
    def dp(self) -> int:
        """Data-parallel ranks; 0 where the degrees do not divide the world size."""
        dp, rest = divmod(self.world, self.tp * self.pp * self.cp)
        return 0 if rest else dp

    @property
    def largest_partition(self) -> int:
        """Elements of the largest weight that one rank keeps under ZeRO-3."""
        return partition(*self.widest, tp=self.tp, dp=self.dp * self.cp)

    def decay_overlaps(self) -> bool:
        """Whether warm-up leaves the decay no room (a warm-up longer than the run has its own rule)."""
        if self.schedule == "wsd":
            return self.warmup + (self.decay or max(1, self.steps // 10)) > self.steps
        return self.schedule in ("linear", "cosine") and 0 < self.decay <= self.warmup

    def changed(self, settings: Mapping[str, Any]) -> Case:
        """A copy with config keys (section.key: value) set."""
        other = copy.copy(self)
        for key, value in settings.items():
            setattr(other, *_ATTRIBUTES[key](value))
        return other


def _elements(value: Any) -> int:
    """A size of a DeepSpeed JSON, which may be written 1e8; 0 where it is left open or no number
    (DeepSpeed says so itself).
    """
    return int(value) if isinstance(value, (int, float)) and 0 < value < 1e18 else 0


def _plain(name: str) -> Any:
    return lambda value: (name, value)


# how a config key shows in a Case; the keys that rules suggest
_ATTRIBUTES: Mapping[str, Any] = {
    "parallel.tp": _plain("tp"),
    "parallel.pp": _plain("pp"),
    "parallel.vpp": _plain("vpp"),
    "parallel.cp": _plain("cp"),
    "parallel.cp_exchange": _plain("exchange"),
    "parallel.sequence_parallel": _plain("sp"),
    "train.micro_batch_size": _plain("micro"),
    "train.global_batch_size": _plain("batch"),
    "train.seq_length": _plain("seq"),
    "train.steps": _plain("steps"),
    "train.eval_every": _plain("eval_every"),
    "train.eval_steps": _plain("eval_steps"),
    "model.max_position_embeddings": _plain("positions"),
    "model.num_query_groups": _plain("groups"),
    "model.head_dim": _plain("head_dim"),
    "model.compile": _plain("compile"),
    "model.dropout": lambda value: ("dropout", value > 0),
    "train.recompute": _plain("recompute"),
    "train.offload_activations": _plain("act_offload"),
    "train.precision": lambda value: ("fp32", value == "fp32"),
    "model.family": lambda value: ("rotary", FAMILIES[value].positions == "rotary"),
    "model.sliding_window": lambda value: ("window", value or 0),
    "model.impl": lambda value: ("te", value == "te"),
    "model.rope_scaling": lambda value: ("rope_scaling", value is not None),
    "optimizer.name": _plain("optimizer"),
    "zero.stage": _plain("stage"),
    "zero.offload_optimizer": _plain("opt_offload"),
    "zero.offload_param": _plain("param_offload"),
    "zero.deepspeed.zero_optimization.zero_hpz_partition_size": lambda value: ("hpz", 1 if value == "auto" else value),
    "zero.deepspeed.zero_optimization.zero_quantized_weights": _plain("qwz"),
    "zero.deepspeed.zero_optimization.zero_quantized_nontrainable_weights": _plain("qwz"),
    "zero.deepspeed.zero_optimization.zero_quantized_gradients": _plain("qgz"),
    "zero.deepspeed.zero_optimization.offload_param.buffer_size": lambda value: ("swap_buffer", 0 if value == "auto" else value),
    "zero.deepspeed.gradient_accumulation_steps": lambda value: ("accumulation", 0 if value == "auto" else value),
    "optimizer.warmup_steps": _plain("warmup"),
    "optimizer.decay_steps": lambda value: ("decay", value or 0),
    "data.document_mask": _plain("documents"),
    "data.split": lambda value: ("has_valid", value[1] > 0),
}

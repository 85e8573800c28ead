"""What is trained and how it is laid out: the one description that memory and time are estimated from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from toolkit.arch.optimizers import OPTIMIZERS, OptimizerSpec
from toolkit.arch.spec import ModelSpec, hash_once
from toolkit.config.deepspeed import hpz_group, zero_key
from toolkit.cost.stack import TOOLKIT, TOOLKIT_TE, Stack
from toolkit.parallel.exchange import choose
from toolkit.parallel.layout import split_layers
from toolkit.parallel.loss_chunks import loss_chunk

if TYPE_CHECKING:
    from toolkit.config.schema import RunConfig

Recompute = Literal["none", "selective", "full", "half", "alternate"]
# half: op-level, every other matrix multiply is kept (torchtitan's "selective op"); alternate: every other layer is recomputed
Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, a layout and a batch. Sequences per optimizer step: batch; per forward of one data-parallel rank: micro."""

    model: ModelSpec
    seq: int
    micro: int = 1
    batch: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    sp: bool = False
    zero: int = 1
    offload_optimizer: Offload = "none"
    offload_param: Offload = "none"
    recompute: Recompute = "none"
    precision: str = "bf16"
    flash: bool = True
    kernel: str | None = None
    cp_exchange: str = "ring"  # parallel.cp_exchange
    overlap: bool = True
    split_checkpoints: bool = False  # recomputed layers' inputs are split over TP (ZeRO-R, arXiv 1910.02054, section 6.1)
    deterministic: bool = False
    fused_accumulation: bool = True  # weight gradients are added to the kept ones inside the GEMM, where the stack keeps them
    stack: Stack = TOOLKIT
    bucket: float = 5e8  # elements of DeepSpeed's reduce bucket (its default)
    overlap_comm: bool = False  # of the DeepSpeed JSON: ZeRO-2 then fills a second bucket while the first one is sent
    persist: float = 1e5  # elements up to which ZeRO-3 keeps a weight whole (DeepSpeed's default)
    optimizer: OptimizerSpec = OPTIMIZERS["adamw"]
    chunked_loss: str = "never"  # train.chunked_loss
    offload_activations: bool = False
    documents: bool = False  # data.document_mask
    sub_group: float = 1e9  # elements that ZeRO-3 steps at a time (DeepSpeed's default)
    lock_optimizer: bool = True  # pin_memory of offload_optimizer: what waits on the host is page-locked (DeepSpeed's default)
    lock_param: bool = True  # the same of offload_param
    hpz: int = 1  # ranks over which ZeRO++ keeps a second partition of the weights
    qwz: bool = False  # ZeRO++ gathers weights in 8 bits
    qgz: bool = False  # ZeRO++ reduces gradients in 4 bits

    __hash__ = hash_once

    def laid_out(self, **fields: Any) -> Workload:
        """The same with other fields: dataclasses.replace() without its checks, for a search that makes very many."""
        other = object.__new__(Workload)
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("_hash", None)
        other.__dict__.update(fields)
        return other

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def microbatches(self) -> int:
        """Forward passes of one rank per optimizer step."""
        return max(1, round(self.batch / (self.micro * self.dp)))

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank, before tensor parallelism."""
        return max(1, self.micro * self.seq // self.cp)

    @property
    def exchange(self) -> str:
        """allgather, ulysses or ring: how context-parallel ranks exchange keys and values."""
        if self.cp_exchange != "auto":
            return self.cp_exchange
        m = self.model
        return _chosen_exchange(m.heads, m.groups, self.cp, self.tp, self.seq, bool(m.dropout), self.precision == "fp32")

    @property
    def loss_chunk(self) -> int:
        """Tokens of one piece of the output layer and the loss; 0 where the logits are whole."""
        return loss_chunk(self.chunked_loss, tokens=self.tokens, columns=self.model.rows // self.tp)

    @property
    def width(self) -> int:
        """Bytes of a parameter and an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def shards(self) -> int:
        """Ranks that hold copies of the same weights, over which ZeRO shards."""
        return self.dp * self.cp

    @property
    def sequence_shards(self) -> int:
        """Ranks over which norms and residuals are split."""
        return self.tp if self.sp else 1

    def layers_on(self, stage: int) -> int:
        """Layers of a pipeline stage."""
        split = split_layers(self.model.layers, self.pp * self.vpp)
        if split is None:
            return sum(self.layers_in(stage, chunk) for chunk in range(self.vpp))
        each, ends = split
        return each * self.vpp - (stage == 0 and ends > 1) - (stage == self.pp - 1 and ends > 0)

    def layers_in(self, stage: int, chunk: int) -> int:
        """Layers of a chunk of a stage; where others split what our rules do not, the first chunks hold one more."""
        chunks, place = self.pp * self.vpp, chunk * self.pp + stage
        split = split_layers(self.model.layers, chunks)
        if split is None:
            each, rest = divmod(self.model.layers, chunks)
            return each + (1 if place < rest else 0)
        each, ends = split
        return each - (place == 0 and ends > 1) - (place == chunks - 1 and ends > 0)

    def parameters_on(self, stage: int) -> float:
        """Weights one rank of a stage would hold without ZeRO."""
        s = self.model
        total = self.layers_on(stage) * s.layer_parameters
        if stage == 0:
            total += s.embedding_parameters
        if stage == self.pp - 1:
            total += s.head_parameters + (s.rows * s.hidden if s.tied and self.pp > 1 else 0)
        return total / self.tp

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Workload:
        """What a run's config asks of a world size; assumes the rules hold.

        model.vocab_size: null counts as the multiple it is padded to, since only the tokenizer knows it.
        """
        m, p, z, t = config.model, config.parallel, config.zero, config.train
        dp = max(1, world_size // (p.tp * p.pp * p.cp))
        bucket, persist = _buffers(config)
        return cls(
            model=m.spec,
            seq=t.seq_length,
            micro=t.micro_batch_size,
            batch=t.global_batch_size,
            tp=p.tp,
            pp=p.pp,
            vpp=p.vpp,
            cp=p.cp,
            cp_exchange=p.cp_exchange,
            dp=dp,
            sp=p.sequence_parallel and p.tp > 1,
            zero=z.stage,
            offload_optimizer=z.offload_optimizer,
            offload_param=z.offload_param,
            recompute=t.recompute,
            precision=t.precision,
            stack=TOOLKIT if m.impl == "local" else TOOLKIT_TE,
            bucket=bucket,
            overlap_comm=bool(zero_key(config, "overlap_comm", False)),
            persist=persist,
            optimizer=config.optimizer.spec,
            sub_group=float(zero_key(config, "sub_group_size", 1e9)),
            lock_optimizer=_locks(config, "offload_optimizer"),
            lock_param=_locks(config, "offload_param"),
            hpz=_hpz(config, dp),
            qwz=bool(zero_key(config, "zero_quantized_weights", False)),
            qgz=bool(zero_key(config, "zero_quantized_gradients", False)),
            chunked_loss=t.chunked_loss,
            offload_activations=t.offload_activations and t.recompute == "full",
            documents=config.data.document_mask,
        )


@lru_cache(maxsize=4096)
def _chosen_exchange(heads: int, groups: int, cp: int, tp: int, seq: int, dropout: bool, fp32: bool) -> str:
    """The name of what "auto" chooses between context-parallel ranks."""
    heads, groups = max(1, heads // tp), max(1, groups // tp)
    return choose("auto", heads=heads, groups=groups, cp=cp, tp=tp, seq=seq, dropout=dropout, fp32=fp32).name


def _hpz(config: RunConfig, dp: int) -> int:
    section = (config.zero.deepspeed or {}).get("zero_optimization") or {}
    if section.get("zero_hpz_partition_size") == "auto":
        return hpz_group(tp=config.parallel.tp, cp=config.parallel.cp, dp=dp)
    return int(zero_key(config, "zero_hpz_partition_size", 1))


def _locks(config: RunConfig, section: str) -> bool:
    """pin_memory of a section of the DeepSpeed JSON; "auto" counts as unset."""
    return zero_key(config, section, {}).get("pin_memory", True) is not False


def _buffers(config: RunConfig) -> tuple[float, float]:
    """Elements of the reduce bucket and of the largest weight ZeRO-3 keeps whole, from the DeepSpeed JSON ("auto": as the engine fills it)."""
    section = (config.zero.deepspeed or {}).get("zero_optimization") or {}
    hidden = config.model.hidden_size
    found = []
    for names, default, auto in (
        (("reduce_bucket_size",), 5e8, hidden * hidden),
        (("stage3_param_persistence_threshold", "param_persistence_threshold"), 1e5, 10 * hidden),
    ):
        value = next((section[n] for n in names if section.get(n) is not None), default)
        found.append(float(auto if value == "auto" else value))
    return found[0], found[1]

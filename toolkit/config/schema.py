"""The run's YAML as pydantic models: one class per section, one line per key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from toolkit.arch.families import FAMILIES
from toolkit.arch.family import Family
from toolkit.arch.optimizers import OPTIMIZERS, OptimizerSpec
from toolkit.arch.spec import ModelSpec

Offload = Literal["none", "cpu", "nvme"]
if TYPE_CHECKING:
    FamilyName = str
    OptimizerName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]

BUILT_IN = "python-stdlib"  # the data that comes with Python itself
LARGEST_INT = 2**31 - 1  # sizes beyond this overflow the 32-bit indices of kernels and index files


def _defaults(key: str) -> str:
    """What a key of the optimizer section is where it is null."""
    having = {o.name: getattr(o, key) for o in OPTIMIZERS.values() if getattr(o, key) is not None}
    return ", ".join(f"{str(value).lower()} ({name})" for name, value in having.items())


class Section(BaseModel):
    """A section of the YAML; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would quietly turn into something else, and text no file system takes."""
        is_switch = cls.model_fields[str(info.field_name)].annotation in (bool, bool | None)
        if isinstance(value, bool) != is_switch and value is not None:
            raise ValueError("must be true or false" if is_switch else "is a switch, where a value belongs")
        texts = [value] if isinstance(value, str) else [key for key in value if isinstance(key, str)] if isinstance(value, dict) else []
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for text in texts for c in text):
            raise ValueError("holds a character that no file name or terminal can show")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, int) and value > LARGEST_INT:
            raise ValueError(f"must be at most {LARGEST_INT}")
        return value


class RunSection(Section):
    dir: Path = Field(Path("runs/run"), description="folder of this run: config, metrics, logs, checkpoints")
    seed: int = Field(1234, ge=0, lt=2**31, description="decides initial weights, data order and dropout")


class RopeScaling(Section):
    """Frequency scaling for a longer context, with Hugging Face's names."""

    type: Literal["llama3", "linear", "yarn"] = Field(
        "llama3",
        validation_alias=AliasChoices("type", "rope_type"),
        description="llama3, yarn: by wavelength, yarn with sharper attention; linear: all alike",
    )
    factor: float = Field(8.0, ge=1.0, description="how many times the context grows")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3 only: wavelengths above context/this are scaled")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3 only: wavelengths below context/this are kept")
    original_max_position_embeddings: int = Field(8192, gt=0, description="tokens of context before scaling")
    beta_fast: float = Field(32.0, gt=0, description="yarn only: wavelengths that turn more often than this in the context are kept")
    beta_slow: float = Field(1.0, gt=0, description="yarn only: wavelengths that turn less often than this are scaled")
    attention_factor: float | None = Field(None, gt=0, description="yarn only: of queries and keys alike; null: 0.1 ln(factor) + 1")

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.type == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError("beta_fast must be larger than beta_slow")
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be larger than low_freq_factor")
        return self


class ModelSection(Section):
    family: FamilyName = Field("llama", description="; ".join(f"{f.name}: {f.title}" for f in FAMILIES.values()))
    preset: str | None = Field(None, description="published shape, e.g. llama3-8b; keys set beside it win")
    impl: Literal["local", "te"] = Field("local", description="local: PyTorch layers; te: Transformer Engine (CUDA)")
    num_layers: int = Field(ge=1, description="transformer layers")
    hidden_size: int = Field(ge=1, description="width of the residual stream")
    num_attention_heads: int = Field(ge=1, description="query heads")
    num_query_groups: int | None = Field(None, ge=1, description="key/value heads; null: one per query head")
    head_dim: int | None = Field(None, ge=1, description="width of one head; null: hidden_size / num_attention_heads")
    ffn_hidden_size: int | None = Field(None, ge=1, description="inner MLP width; null: 4h (gpt), else 8h/3 rounded up to 256")
    vocab_size: int | None = Field(None, ge=1, description="token ids the model knows; null: the tokenizer's")
    vocab_multiple: int = Field(128, ge=1, description="embedding rows are padded to a multiple of this, never of TP")
    max_position_embeddings: int = Field(2048, ge=1, description="longest sequence in tokens")
    tie_embeddings: bool = Field(False, description="output layer shares the word embedding")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="probability, for attention and residual alike")
    qk_layernorm: bool | None = Field(None, description="normalise queries and keys per head; null: the family's (qwen3: true)")
    rope_theta: float = Field(10000.0, gt=0, description="RoPE base")
    rope_scaling: RopeScaling | None = Field(None, description="RoPE scaling, as Hugging Face's rope_scaling")
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance in norms")
    activation: Literal["gelu_tanh", "gelu", "swiglu"] | None = Field(
        None, description="of the MLP; null: gelu_tanh (gpt), else swiglu; gelu: gpt with the exact form"
    )
    attention_bias: bool | None = Field(None, description="biases in the attention's linear layers; null: the family's (gpt: true)")
    qkv_bias: bool | None = Field(None, description="biases of queries, keys and values; null: true (qwen2), else as attention_bias")
    mlp_bias: bool | None = Field(None, description="biases in the MLP's linear layers; null: the family's (gpt: true)")
    norm_bias: bool | None = Field(None, description="biases in LayerNorms; null: true (gpt); RMSNorms have none")
    sliding_window: int | None = Field(None, ge=1, description="tokens each one attends back to; null: all before it")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    compile: bool = Field(False, description="torch.compile each transformer layer")

    @model_validator(mode="after")
    def _fill(self) -> ModelSection:
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}: "
                    "heads need a whole width. Set head_dim, or change one of the two"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = self.of_family.ffn(self.hidden_size)
        return self._fill_by_family()

    def _fill_by_family(self) -> ModelSection:
        family = self.of_family
        self.activation = self.activation or family.activations[0]  # type: ignore[assignment]
        for name in ("attention_bias", "mlp_bias", "norm_bias", "qk_layernorm"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(family, name))
        if self.qkv_bias is None:
            self.qkv_bias = family.qkv_bias or self.attention_bias
        if self.activation not in family.activations:
            fit = " or ".join(family.activations)
            raise ValueError(f"activation={self.activation} does not belong to family {self.family}. Set activation to {fit}")
        if self.norm_bias and family.norm == "rms":
            raise ValueError(f"norm_bias=true with family {self.family}: an RMSNorm has no bias. Set norm_bias to false")
        if self.attention_bias and not self.qkv_bias:
            raise ValueError(
                "attention_bias=true with qkv_bias=false: the projection behind attention has a bias only where queries, keys and "
                "values have one. Set qkv_bias to true, or attention_bias to false"
            )
        if self.impl == "te" and (self.attention_bias != self.mlp_bias or self.norm_bias != (family.norm == "layer")):
            raise ValueError(
                f"impl=te with attention_bias={self.attention_bias}, mlp_bias={self.mlp_bias}, norm_bias={self.norm_bias}: its layers have "
                "one switch for all linear biases and norms of one kind. Set impl to local"
            )
        return self

    @property
    def of_family(self) -> Family:
        """What the family's models have in common."""
        return FAMILIES[self.family]

    @property
    def spec(self) -> ModelSpec:
        """What the model is, weight by weight; vocab_size: null counts as the multiple it is padded to."""
        assert self.num_query_groups and self.head_dim and self.ffn_hidden_size, "filled by _fill"
        family, vocab = self.of_family, self.vocab_size or self.vocab_multiple
        return ModelSpec(
            layers=self.num_layers,
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            groups=self.num_query_groups,
            head_dim=self.head_dim,
            ffn=self.ffn_hidden_size,
            vocab=vocab,
            rows=-(-vocab // self.vocab_multiple) * self.vocab_multiple,
            positions=self.max_position_embeddings if family.positions == "learned" else 0,
            norm=family.norm,
            gated=self.activation == "swiglu",
            tied=self.tie_embeddings,
            qkv_bias=bool(self.qkv_bias),
            proj_bias=bool(self.attention_bias),
            mlp_bias=bool(self.mlp_bias),
            norm_bias=bool(self.norm_bias),
            qk_norm=bool(self.qk_layernorm),
            dropout=self.dropout > 0,
            fused_norms=self.impl == "te",
        )


class ParallelSection(Section):
    tp: int = Field(1, ge=1, description="tensor parallel degree")
    pp: int = Field(1, ge=1, description="pipeline parallel degree (stages)")
    vpp: int = Field(1, ge=1, description="model chunks per stage (interleaved pipeline)")
    cp: int = Field(1, ge=1, description="context parallel degree: ranks that share each sequence")
    cp_exchange: Literal["auto", "allgather", "ulysses", "ring"] = Field(
        "auto", description="how keys and values reach queries: gathered; heads for tokens; passed round; auto: by shape and link"
    )
    sequence_parallel: bool = Field(False, description="shard norms and dropout over the tensor parallel ranks")


class ZeroSection(Section):
    stage: int = Field(1, ge=0, le=3, description="0: none, 1: optimizer states, 2: + gradients, 3: + parameters")
    offload_optimizer: Offload = Field("none", description="where optimizer states live")
    offload_param: Offload = Field("none", description="where parameters live between uses (stage 3)")
    nvme_path: Path | None = Field(None, description="folder on a local disk for nvme offload")
    config: Path | None = Field(None, description="a DeepSpeed JSON to start from; read once, into the keys here and zero.deepspeed")
    deepspeed: dict[str, Any] | None = Field(None, description="DeepSpeed's own keys that have no key here, passed through")


class TrainSection(Section):
    steps: int = Field(20, ge=1, description="optimizer steps in the whole run")
    global_batch_size: int = Field(8, ge=1, description="sequences per optimizer step over all ranks")
    micro_batch_size: int = Field(1, ge=1, description="sequences per forward pass of one data-parallel rank")
    seq_length: int = Field(2048, ge=1, description="tokens per sequence")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="of parameters and activations in forward and backward")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activation recompute: full: every layer; selective: core attention, which saves nothing to speak of where a flash kernel runs",
    )
    offload_activations: bool = Field(False, description="with recompute full: inputs of layers wait in host memory for the backward")
    chunked_loss: Literal["auto", "always", "never"] = Field(
        "auto", description="output layer and loss piece by piece, without a micro-batch's whole logits; auto: from 1 GiB of them on"
    )
    grad_clip: float = Field(1.0, ge=0.0, description="largest global gradient norm; 0: no clipping")
    eval_every: int = Field(0, ge=0, description="optimizer steps between evaluations; 0: never")
    eval_steps: int = Field(0, ge=0, description="global batches per evaluation")
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="a non-finite loss or gradient: stop, or skip the step")
    watchdog_s: float = Field(
        1500.0,
        ge=0.0,
        description="seconds without progress (a step, an evaluation batch, a save; the first step has three times as long) after which "
        "every rank says what it waits in, and the run ends with exit code 75; 0: never",
    )
    check_replicas_every: int = Field(0, ge=0, description="optimizer steps between checks that replicas hold the same bits; 0: never")
    check_repeat_every: int = Field(0, ge=0, description="optimizer steps between checks that a batch gives the same loss twice; 0: never")


class OptimizerSection(Section):
    name: OptimizerName = Field("adamw", description="; ".join(f"{o.name}: {o.title}" for o in OPTIMIZERS.values()))
    lr: float = Field(3e-4, ge=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate the schedule ends at")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Adam's moment decay rates")
    eps: float = Field(1e-8, gt=0, description="Adam's denominator term")
    momentum: float | None = Field(None, ge=0, lt=1, description=f"null: {_defaults('momentum')}; other optimizers have none")
    nesterov: bool | None = Field(None, description=f"step ahead with the momentum; null: {_defaults('nesterov')}")
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="of muon's matrices: lr x 0.2 sqrt(longer side), so that one lr fits all weights; or x sqrt(rows / columns)",
    )
    weight_decay: float = Field(0.1, ge=0, description="on matrices; norms and biases have none")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field("cosine", description="learning rate after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    decay_steps: int | None = Field(
        None,
        ge=1,
        description="step at which min_lr is reached; null: train.steps. wsd: length of the final decay; null: a tenth of train.steps",
    )

    @model_validator(mode="after")
    def _betas(self) -> OptimizerSection:
        if not all(0.0 <= b < 1.0 for b in self.betas):
            raise ValueError(f"betas={list(self.betas)} must lie in [0, 1)")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is larger than lr={self.lr}: the schedule only falls. Set min_lr at most {self.lr}")
        spec = OPTIMIZERS[self.name]
        for key in ("momentum", "nesterov"):
            if getattr(self, key) is not None and getattr(spec, key) is None:
                names = " or ".join(o.name for o in OPTIMIZERS.values() if getattr(o, key) is not None)
                given = str(getattr(self, key)).lower()
                raise ValueError(f"{key}={given} with name={self.name}, which has none. Set it to null, or name to {names}")
        if self.spec.nesterov and not self.spec.momentum:
            raise ValueError("nesterov=true with momentum=0: there is no momentum to step ahead with. Set nesterov to false")
        return self

    @property
    def spec(self) -> OptimizerSpec:
        """Which weights are updated by which rule, what is kept for them, and momentum and nesterov
        as they are used.
        """
        return OPTIMIZERS[self.name].with_settings(momentum=self.momentum, nesterov=self.nesterov)


class DataSection(Section):
    source: str | None = Field(BUILT_IN, description="built-in name, text/jsonl/parquet path, hub name, or a prepared prefix")
    tokenizer: str = Field("bytes", description="bytes, a tokenizer.json, a Hugging Face name, or train:N (BPE of N ids)")
    split: tuple[float, float, float] = Field((98, 1, 1), description="train, valid, test weights")
    blend: dict[str, float] | None = Field(None, description="prepared prefix: weight; instead of source")
    workers: int = Field(2, ge=0, description="loader processes per rank")
    cache_dir: Path | None = Field(None, description="prepared data and indices; null: data/ beside the run folder")
    text_key: str = Field("text", description="field of jsonl/parquet/hub rows that holds the text")
    document_mask: bool = Field(False, description="attention, positions and loss stop at document ends")
    packing: Literal["concat", "best_fit"] = Field(
        "concat", description="concat: documents joined and cut at seq_length; best_fit: whole documents packed, only longer ones cut"
    )

    @model_validator(mode="after")
    def _weights(self) -> DataSection:
        if min(self.split) < 0 or self.split[0] <= 0:
            raise ValueError(f"split={list(self.split)} needs weights >= 0 and a share for train")
        if self.packing == "best_fit" and not self.document_mask:
            raise ValueError(
                "packing=best_fit with document_mask=false: whole documents pay only where each is kept to itself. "
                "Set document_mask to true, or packing to concat"
            )
        if self.blend and self.source not in (None, BUILT_IN):
            raise ValueError(f"source={self.source} beside blend: the two name the data twice. Remove one of them, or set it to null")
        if self.blend:
            self.source = None  # the default, which files of earlier versions hold beside a blend
        if self.blend is not None and (not self.blend or any(w <= 0 for w in self.blend.values())):
            raise ValueError("blend needs at least one prefix, and weights > 0")
        return self


class CheckpointSection(Section):
    dir: Path | None = Field(None, description="null: checkpoints/ in the run folder")
    every: int = Field(0, ge=0, description="optimizer steps between saves; 0: never")
    keep: int = Field(2, ge=1, description="complete checkpoints kept")
    resume: Literal["auto", "must", "never"] = Field("auto", description="auto: from the newest complete checkpoint, if any")
    async_save: bool = Field(True, description="write while training goes on")
    init_from: Path | None = Field(None, description="weights to start from, with a fresh optimizer")


class LogSection(Section):
    every: int = Field(1, ge=1, description="optimizer steps between step lines")
    tensorboard: bool = Field(False, description="TensorBoard files in RUN/logs")
    wandb: bool = Field(False, description="Weights & Biases, under the run folder's name")
    csv: bool = Field(False, description="CSV files in RUN/logs")


class RunConfig(Section):
    """One run, whole: the result of training depends on nothing else."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    zero: ZeroSection = Field(default_factory=ZeroSection)
    train: TrainSection = Field(default_factory=TrainSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    data: DataSection = Field(default_factory=DataSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)

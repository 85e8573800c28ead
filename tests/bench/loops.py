"""The loops that are compared: each trains the same Llama on the same batches, one optimizer step per call."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Batch = dict[str, torch.Tensor]
Step = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """What is trained: fp32, one process, `micro_batches` forward passes of `micro_batch_size` sequences a step."""

    num_layers: int = 8
    hidden_size: int = 512
    heads: int = 8
    ffn: int = 1536
    vocab: int = 8192
    seq_length: int = 256
    micro_batch_size: int = 2
    micro_batches: int = 4
    lr: float = 1e-3
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.1

    def config(self, *, zero_stage: int = 1) -> Any:
        """The shape as a run's config."""
        from toolkit.config.load import parse_config

        return parse_config(
            {
                "model": {
                    "family": "llama",
                    "num_layers": self.num_layers,
                    "hidden_size": self.hidden_size,
                    "num_attention_heads": self.heads,
                    "ffn_hidden_size": self.ffn,
                    "vocab_size": self.vocab,
                    "max_position_embeddings": self.seq_length,
                },
                "zero": {"stage": zero_stage},
                "train": {
                    "global_batch_size": self.micro_batch_size * self.micro_batches,
                    "micro_batch_size": self.micro_batch_size,
                    "seq_length": self.seq_length,
                    "precision": "fp32",
                    "grad_clip": self.clip,
                },
                "optimizer": {"lr": self.lr, "schedule": "constant", "betas": list(self.betas), "weight_decay": self.decay},
            }
        )

    def rows(self, step: int) -> torch.Tensor:
        """Token ids of one global batch, [sequences, seq_length + 1]; the same in every loop."""
        generator = torch.Generator().manual_seed(1000 + step)
        return torch.randint(0, self.vocab, (self.micro_batch_size * self.micro_batches, self.seq_length + 1), generator=generator)

    def batches(self, step: int) -> Iterator[Batch]:
        for rows in self.rows(step).split(self.micro_batch_size):
            yield {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def _world(shape: Shape, *, zero_stage: int) -> tuple[Any, Any]:
    """A world of one with megatron-core's groups, exactly as `toolkit train` opens it."""
    from toolkit.parallel.layout import Layout
    from toolkit.train.world import World, connect

    config = shape.config(zero_stage=zero_stage)
    layout = Layout.of(config, 1)
    connect(World.from_environment(), layout, seed=config.run.seed)
    return config, layout


def toolkit_loop(shape: Shape, *, zero_stage: int) -> Step:
    """What `toolkit train` does between the data and the step line."""
    from toolkit.engine.schedule import Schedule
    from toolkit.engine.zero import Engine, partitioner
    from toolkit.model.build import build_chunks
    from toolkit.parallel.deepspeed_json import deepspeed_config

    config, layout = _world(shape, zero_stage=zero_stage)
    ds_config = deepspeed_config(config, layout)
    chunks = build_chunks(config, layout, device=torch.device("cpu"), partition=partitioner(config, ds_config))
    engine = Engine(chunks, config, layout, ds_config)
    schedule = Schedule(engine.views, layout, seq_length=shape.seq_length, micro_batch_size=shape.micro_batch_size)
    count = 0

    def step() -> float:
        nonlocal count
        batches = list(shape.batches(count))
        count += 1
        engine.set_lr(shape.lr)
        engine.begin()
        loss = schedule(lambda: iter(batches), num_microbatches=shape.micro_batches)
        float(engine.finish())
        assert loss is not None
        return float(loss)

    return step


def bare_loop(shape: Shape, *, own_layers: bool = False) -> Step:
    """megatron-core alone: GPTModel, its schedule, torch's fused AdamW, clip_grad_norm_; no DeepSpeed.

    own_layers: megatron-core's local layer spec as it comes (its torch norm and its unfused attention)
    instead of the toolkit's.
    """
    from toolkit.engine.schedule import ChunkView, Schedule
    from toolkit.model import build

    config, layout = _world(shape, zero_stage=1)
    if own_layers:  # in this process for good: it runs one loop
        setattr(build, "local_spec", _megatron_spec)  # noqa: B010
    (model,) = build.build_chunks(config, layout, device=torch.device("cpu"))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": shape.decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=shape.lr,
        betas=shape.betas,
        fused=True,
    )
    schedule = Schedule([ChunkView(model, model)], layout, seq_length=shape.seq_length, micro_batch_size=shape.micro_batch_size)
    parameters = list(model.parameters())
    count = 0

    def step() -> float:
        nonlocal count
        batches = list(shape.batches(count))
        count += 1
        optimizer.zero_grad()
        loss = schedule(lambda: iter(batches), num_microbatches=shape.micro_batches)
        float(torch.nn.utils.clip_grad_norm_(parameters, shape.clip))
        optimizer.step()
        assert loss is not None
        return float(loss)

    return step


def _megatron_spec(settings: Any, *, num_layers: int) -> Any:
    from megatron.core.fusions import fused_softmax
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    # the one line of it that asks for a GPU
    fused_softmax.get_default_causal_mask = functools.cache(lambda s: torch.ones(s, s).triu(diagonal=1).bool())
    layer = get_gpt_layer_local_spec(normalization=settings.normalization)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=WrappedTorchNorm)


class Rows(torch.utils.data.Dataset):
    """The batches' sequences in order, as Hugging Face's Trainer wants them: labels are the inputs, which it shifts."""

    def __init__(self, shape: Shape, steps: int) -> None:
        self.shape, self.steps = shape, steps
        self.per_step = shape.micro_batch_size * shape.micro_batches
        self.held: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __getitem__(self, index: int) -> Batch:
        step, row = divmod(index, self.per_step)
        if self.held is None or self.held[0] != step:
            self.held = (step, self.shape.rows(step))
        return {"input_ids": self.held[1][row, :-1], "labels": self.held[1][row, :-1]}


def hugging_face(shape: Shape, pause: Callable[[float | None], bool], *, zero_stage: int) -> None:
    """transformers' Trainer with a DeepSpeed JSON, whole: its train() runs until `pause` says stop.

    pause: called before the first step with None and after each step with its loss; may block.
    """
    os.environ.setdefault("ACCELERATE_USE_DEEPSPEED", "true")
    from torch.utils.data import SequentialSampler
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Turns(TrainerCallback):
        first = True

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.first:
                self.first = False
                control.should_training_stop = not pause(None)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:  # logging comes after every step
                control.should_training_stop = not pause(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    ds_config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": zero_stage},
    }
    steps = 100_000
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.micro_batch_size,
            gradient_accumulation_steps=shape.micro_batches,
            max_steps=steps,
            learning_rate=shape.lr,
            lr_scheduler_type="constant",
            adam_beta1=shape.betas[0],
            adam_beta2=shape.betas[1],
            weight_decay=shape.decay,
            max_grad_norm=shape.clip,
            deepspeed=ds_config,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        torch.manual_seed(1234)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.ffn,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.heads,
                max_position_embeddings=shape.seq_length,
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        trainer = InOrder(model=model, args=arguments, train_dataset=Rows(shape, steps), callbacks=[Turns()])
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                trainer.remove_callback(callback)
        trainer.train()

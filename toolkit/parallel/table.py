"""The table of rules itself: one entry per thing that every legal run satisfies."""

from __future__ import annotations

from toolkit.arch.optimizers import OPTIMIZERS
from toolkit.parallel.case import Case
from toolkit.parallel.layout import split_layers
from toolkit.parallel.options import (
    Option,
    batches,
    choices,
    degrees,
    divisors_near,
    micro_batches,
    sequences,
    splits,
    warm_ups,
)
from toolkit.parallel.rule import Rule


def _tp_rule(id: str, key: str, attribute: str, why: str) -> Rule[Case]:
    return Rule(
        id=id,
        title=f"`parallel.tp` divides `{key}`",
        why=why,
        broken=lambda c: getattr(c, attribute) % c.tp != 0,
        what=lambda c: f"parallel.tp={c.tp} does not divide {key}={getattr(c, attribute)}",
        options=lambda c: divisors_near(c, "parallel.tp", getattr(c, attribute)),
    )


def _offloads(c: Case) -> dict[str, str]:
    return {
        key: device
        for key, device in (("zero.offload_optimizer", c.opt_offload), ("zero.offload_param", c.param_offload))
        if device != "none"
    }


def _no_nvme(c: Case, device: str) -> Option:
    return {key: device for key, now in _offloads(c).items() if now == "nvme"}


def _nvme_to_cpu(c: Case) -> Option:
    """Offload to the CPU in the place of NVMe, with the stage that it needs."""
    option = _no_nvme(c, "cpu")
    least = 3 if "zero.offload_param" in option else 1
    return option if c.stage >= least else {"zero.stage": least, **option}


RULES: tuple[Rule[Case], ...] = (
    Rule(
        id="world-size",
        title="`parallel.tp` x `parallel.pp` x `parallel.cp` divides the number of processes",
        why="every model copy needs that many processes, and all copies are alike",
        broken=lambda c: c.world % (c.tp * c.pp * c.cp) != 0,
        what=lambda c: f"{c.world} processes are no multiple of parallel.tp={c.tp} x parallel.pp={c.pp} x parallel.cp={c.cp}",
        options=degrees,
        hint="start a multiple of tp x pp x cp processes",
    ),
    _tp_rule("tp-heads", "model.num_attention_heads", "heads", "each rank computes whole attention heads"),
    _tp_rule("tp-groups", "model.num_query_groups", "groups", "each rank needs whole key/value groups"),
    _tp_rule("tp-ffn", "model.ffn_hidden_size", "ffn", "each rank holds an equal slice of the MLP"),
    Rule(
        id="tp-vocab",
        title="`parallel.tp` divides the padded vocabulary",
        why="each rank holds equally many rows of the embedding, and the padding must not depend on tp",
        broken=lambda c: c.vocab % c.tp != 0,
        what=lambda c: (
            f"parallel.tp={c.tp} does not divide "
            + (f"the padded vocabulary of {c.vocab}" if c.vocab_known else f"model.vocab_multiple={c.vocab}")
        ),
        options=lambda c: divisors_near(c, "parallel.tp", c.vocab),
    ),
    Rule(
        id="heads-groups",
        title="`model.num_query_groups` divides `model.num_attention_heads`",
        why="each key/value head serves the same number of query heads",
        broken=lambda c: c.heads % c.groups != 0,
        what=lambda c: f"model.num_query_groups={c.groups} does not divide model.num_attention_heads={c.heads}",
        options=lambda c: divisors_near(c, "model.num_query_groups", c.heads),
    ),
    Rule(
        id="sp-tp",
        title="`parallel.sequence_parallel` needs `parallel.tp` > 1",
        why="it splits the sequence over the tensor-parallel ranks, and there is one",
        broken=lambda c: c.sp and c.tp == 1,
        what=lambda c: f"parallel.sequence_parallel=true with parallel.tp={c.tp}",
        options=lambda c: choices({"parallel.sequence_parallel": False}, {"parallel.tp": 2}),
    ),
    Rule(
        id="sp-sequence",
        title="with `parallel.sequence_parallel`, `parallel.tp` x `parallel.cp` divides `train.seq_length`",
        why="each tensor-parallel rank normalises an equal share of the sequence",
        broken=lambda c: c.sp and c.seq % (c.tp * c.cp) != 0,
        what=lambda c: f"train.seq_length={c.seq} is no multiple of parallel.tp={c.tp} x parallel.cp={c.cp} under sequence_parallel",
        options=sequences,
    ),
    Rule(
        id="pp-layers",
        title="`parallel.pp` x `parallel.vpp` divides `model.num_layers`, or that number with the output layer, or with the embedding too, counted as one",
        why="every chunk of a stage holds equally many layers, but for one fewer beside the output layer and beside the embedding",
        broken=lambda c: split_layers(c.layers, c.pp * c.vpp) is None,
        what=lambda c: f"parallel.pp={c.pp} x parallel.vpp={c.vpp} does not split model.num_layers={c.layers}",
        options=splits,
    ),
    Rule(
        id="vpp-pp",
        title="`parallel.vpp` > 1 needs `parallel.pp` > 1",
        why="chunks of one stage interleave with those of others",
        broken=lambda c: c.vpp > 1 and c.pp == 1,
        what=lambda c: f"parallel.vpp={c.vpp} with parallel.pp=1",
        options=lambda c: choices({"parallel.vpp": 1}, {"parallel.pp": 2}),
    ),
    Rule(
        id="batch",
        title="`train.micro_batch_size` x dp divides `train.global_batch_size`",
        why="every data-parallel rank runs the same number of whole micro-batches",
        broken=lambda c: c.batch % (c.micro * c.dp) != 0 if c.dp else False,
        what=lambda c: f"train.global_batch_size={c.batch} is no multiple of train.micro_batch_size={c.micro} x {c.dp} data-parallel ranks",
        options=lambda c: batches(c, micro_too=True),
    ),
    Rule(
        id="accumulation",
        title="`gradient_accumulation_steps` of a DeepSpeed JSON equals the number of micro-batches",
        why="the global batch decides it, and the two disagree",
        broken=lambda c: bool(c.dp and c.accumulation) and c.batch != c.accumulation * c.micro * c.dp,
        what=lambda c: (
            f"gradient_accumulation_steps={c.accumulation} in the DeepSpeed JSON, with train.micro_batch_size={c.micro} x {c.dp} "
            f"data-parallel ranks, does not make train.global_batch_size={c.batch}"
        ),
        options=micro_batches,
        hint='set the JSON\'s to "auto"',
    ),
    Rule(
        id="vpp-microbatches",
        title="with `parallel.vpp` > 1, `parallel.pp` divides the number of micro-batches",
        why="the interleaved schedule runs micro-batches in rounds of one per stage",
        broken=lambda c: c.vpp > 1 and c.dp > 0 and c.batch % (c.micro * c.dp) == 0 and c.batch // (c.micro * c.dp) % c.pp != 0,
        what=lambda c: (
            f"{c.batch // (c.micro * c.dp)} micro-batches (train.global_batch_size={c.batch} / train.micro_batch_size={c.micro} / "
            f"{c.dp} data-parallel ranks) are no multiple of parallel.pp={c.pp} with parallel.vpp={c.vpp}"
        ),
        options=lambda c: batches(c, micro_too=False),
    ),
    Rule(
        id="positions",
        title="`train.seq_length` is at most `model.max_position_embeddings`",
        why="the model knows no positions beyond",
        broken=lambda c: c.seq > c.positions,
        what=lambda c: f"train.seq_length={c.seq} exceeds model.max_position_embeddings={c.positions}",
        options=sequences,
    ),
    Rule(
        id="cp-sequence",
        title="2 x `parallel.cp` divides `train.seq_length`",
        why="each context-parallel rank holds two chunks, one from each half, so that all have equally much to attend to",
        broken=lambda c: c.cp > 1 and c.seq % (2 * c.cp) != 0,
        what=lambda c: f"train.seq_length={c.seq} is no multiple of 2 x parallel.cp={c.cp}",
        options=sequences,
    ),
    Rule(
        id="cp-heads",
        title="`parallel.cp_exchange: ulysses`: `parallel.tp` x `parallel.cp` divides `model.num_attention_heads`",
        why="it gives each rank the whole sequence for whole query heads",
        broken=lambda c: c.cp > 1 and c.exchange == "ulysses" and c.heads % (c.tp * c.cp) != 0,
        what=lambda c: (
            f"parallel.cp_exchange=ulysses with parallel.tp={c.tp} x parallel.cp={c.cp}, which does not divide "
            f"model.num_attention_heads={c.heads}"
        ),
        options=lambda c: choices({"parallel.cp_exchange": "allgather"}, {"parallel.cp": 1}),
    ),
    Rule(
        id="ring-dropout",
        title="`parallel.cp_exchange: ring` needs `model.dropout` 0",
        why="each step of the ring would have to drop the same scores again in the backward",
        broken=lambda c: c.cp > 1 and c.exchange == "ring" and c.dropout,
        what=lambda c: "parallel.cp_exchange=ring with model.dropout > 0",
        options=lambda c: choices({"parallel.cp_exchange": "allgather"}, {"model.dropout": 0.0}),
    ),
    Rule(
        id="ring-precision",
        title="`parallel.cp_exchange: ring` on a GPU needs `train.precision` bf16 or fp16",
        why="the flash kernel whose results a ring merges takes 16 bits alone there",
        broken=lambda c: c.cp > 1 and c.exchange == "ring" and c.fp32 and c.cuda and not c.te,
        what=lambda c: "parallel.cp_exchange=ring with train.precision=fp32",
        options=lambda c: choices({"parallel.cp_exchange": "allgather"}, {"train.precision": "bf16"}),
    ),
    Rule(
        id="te-machine",
        title="`model.impl: te` needs CUDA and Transformer Engine",
        why="its layers are CUDA kernels of that package",
        broken=lambda c: c.te and not (c.cuda and c.has_te),
        what=lambda c: "model.impl=te on a machine without " + ("Transformer Engine" if c.cuda else "CUDA"),
        options=lambda c: choices({"model.impl": "local"}, {"model.impl": "local", "parallel.cp": 1}),
    ),
    Rule(
        id="rope-head",
        title="with rotary positions, `model.head_dim` is even",
        why="RoPE rotates pairs of dimensions",
        broken=lambda c: c.rotary and c.head_dim % 2 != 0,
        what=lambda c: f"model.head_dim={c.head_dim} is odd",
        options=lambda c: choices({"model.head_dim": c.head_dim + 1}),
    ),
    Rule(
        id="rope-scaling",
        title="`model.rope_scaling` needs a family with rotary positions",
        why="gpt has learned positions, which it would silently not scale",
        broken=lambda c: c.rope_scaling and not c.rotary,
        what=lambda c: "model.rope_scaling is set with model.family=gpt",
        options=lambda c: choices({"model.rope_scaling": None}, {"model.family": "llama"}),
    ),
    Rule(
        id="sliding-window",
        title="`train.seq_length` is at most `model.sliding_window`",
        why="attention here reaches back over the whole sequence: within the window that is the same, beyond it another model",
        broken=lambda c: 0 < c.window < c.seq,
        what=lambda c: f"train.seq_length={c.seq} exceeds model.sliding_window={c.window}",
        options=lambda c: choices({"train.seq_length": c.window}, {"model.sliding_window": None}),
    ),
    Rule(
        id="compile-stage",
        title="`model.compile` needs `zero.stage` <= 1",
        why="ZeRO-2 and 3 hook into each layer's gradients and parameters, which a compiled layer hides",
        broken=lambda c: c.compile and c.stage > 1,
        what=lambda c: f"model.compile=true with zero.stage={c.stage}",
        options=lambda c: choices({"model.compile": False}, {"zero.stage": 1}),
    ),
    Rule(
        id="compile-layers",
        title="`model.compile` needs `parallel.tp` and `parallel.cp` 1 and `train.recompute: none`",
        why="a compiled layer breaks at its collectives, and no parity run has proven it under recompute",
        broken=lambda c: c.compile and (c.tp > 1 or c.cp > 1 or c.recompute != "none"),
        what=lambda c: f"model.compile=true with parallel.tp={c.tp}, parallel.cp={c.cp} and train.recompute={c.recompute}",
        options=lambda c: choices({"model.compile": False}),
    ),
    Rule(
        id="offload-activations",
        title="`train.offload_activations` needs `train.recompute: full`",
        why="without it every tensor between the operators of a layer would travel, many times what a layer takes to compute",
        broken=lambda c: c.act_offload and c.recompute != "full",
        what=lambda c: f"train.offload_activations=true with train.recompute={c.recompute}",
        options=lambda c: choices({"train.recompute": "full"}, {"train.offload_activations": False}),
    ),
    Rule(
        id="document-mask",
        title="`data.document_mask` needs `model.impl: local` and `model.compile` false",
        why="the toolkit's own attention keeps documents apart, and not inside a compiled layer",
        broken=lambda c: c.documents and (c.te or c.compile),
        what=lambda c: "data.document_mask=true with " + ("model.impl=te" if c.te else "model.compile=true"),
        options=lambda c: choices(
            {"model.impl": "local"} if c.te else {"model.compile": False},
            {"model.impl": "local", "model.compile": False},
            {"data.document_mask": False},
        ),
    ),
    Rule(
        id="offload-optimizer-stage",
        title="`zero.offload_optimizer` needs `zero.stage` >= 1",
        why="stage 0 keeps no optimizer states of its own to move",
        broken=lambda c: c.opt_offload != "none" and c.stage < 1,
        what=lambda c: f"zero.offload_optimizer={c.opt_offload} with zero.stage={c.stage}",
        options=lambda c: choices({"zero.stage": 1}, {"zero.stage": 3}, {"zero.offload_optimizer": "none"}),
    ),
    Rule(
        id="optimizer-offload",
        title=f"`zero.offload_optimizer` needs `optimizer.name` {' or '.join(o.name for o in OPTIMIZERS.values() if o.on_cpu)}",
        why="DeepSpeed has an implementation for the CPU of Adam alone",
        broken=lambda c: c.opt_offload != "none" and not OPTIMIZERS[c.optimizer].on_cpu,
        what=lambda c: f"zero.offload_optimizer={c.opt_offload} with optimizer.name={c.optimizer}",
        options=lambda c: choices({"zero.offload_optimizer": "none"}, {"optimizer.name": "adamw"}),
    ),
    Rule(
        id="muon-stage",
        title=f"`optimizer.name: {', '.join(o.name for o in OPTIMIZERS.values() if o.whole)}` needs `zero.stage` <= 1",
        why="it looks at whole matrices, whose gradients no rank holds in stages 2 and 3",
        broken=lambda c: c.stage > 1 and OPTIMIZERS[c.optimizer].whole,
        what=lambda c: f"optimizer.name={c.optimizer} with zero.stage={c.stage}",
        options=lambda c: choices({"zero.stage": 1}, {"zero.stage": 1, "zero.offload_param": "none"}, {"optimizer.name": "adamw"}),
    ),
    Rule(
        id="offload-param-stage",
        title="`zero.offload_param` needs `zero.stage` 3",
        why="below stage 3 every rank holds its whole parameters on the device",
        broken=lambda c: c.param_offload != "none" and c.stage < 3,
        what=lambda c: f"zero.offload_param={c.param_offload} with zero.stage={c.stage}",
        options=lambda c: choices({"zero.stage": 3}, {"zero.offload_param": "none"}),
    ),
    Rule(
        id="nvme-optimizer-stage",
        title="`zero.offload_optimizer: nvme` needs `zero.stage` 3",
        why="DeepSpeed swaps optimizer states to disk in stage 3 only",
        broken=lambda c: c.opt_offload == "nvme" and c.stage < 3,
        what=lambda c: f"zero.offload_optimizer=nvme with zero.stage={c.stage}",
        options=lambda c: choices({"zero.stage": 3}, _nvme_to_cpu(c), {"zero.offload_optimizer": "none"}),
    ),
    Rule(
        id="nvme-path",
        title="offload to nvme needs `zero.nvme_path`",
        why="there is no folder to write to",
        broken=lambda c: not c.nvme_path and "nvme" in (c.opt_offload, c.param_offload),
        what=lambda c: " and ".join(f"{k}={v}" for k, v in _offloads(c).items() if v == "nvme") + " with zero.nvme_path=null",
        options=lambda c: choices(_nvme_to_cpu(c), _no_nvme(c, "none")),
        hint="set zero.nvme_path to a folder on a local disk",
    ),
    Rule(
        id="nvme-buffer",
        title="`offload_param.buffer_size` of a DeepSpeed JSON holds the largest weight's partition",
        why="DeepSpeed reads a rank's part of a weight from NVMe into one buffer",
        broken=lambda c: c.param_offload == "nvme" and 0 < c.swap_buffer < c.largest_partition,
        what=lambda c: (
            f"offload_param.buffer_size={c.swap_buffer} is less than the {c.largest_partition} elements of a weight that a rank keeps"
        ),
        options=lambda c: choices({"zero.deepspeed.zero_optimization.offload_param.buffer_size": "auto"}),
    ),
    Rule(
        id="partial-offload",
        title="`offload_optimizer.ratio` < 1 and `super_offload` of a DeepSpeed JSON need `zero.stage` 3",
        why="DeepSpeed splits the optimizer between devices in stage 3 only",
        broken=lambda c: c.partial_offload and c.opt_offload != "none" and c.stage < 3,
        what=lambda c: f"the DeepSpeed JSON offloads a part of the optimizer with zero.stage={c.stage}",
        options=lambda c: choices({"zero.stage": 3}, {"zero.offload_optimizer": "none"}),
    ),
    Rule(
        id="zeropp-stage",
        title="ZeRO++ (`zero_hpz_partition_size`, `zero_quantized_weights`, `zero_quantized_gradients`) needs `zero.stage` 3",
        why="below stage 3 DeepSpeed ignores those keys",
        broken=lambda c: c.stage < 3 and (c.hpz > 1 or c.qwz or c.qgz),
        what=lambda c: f"the DeepSpeed JSON asks for ZeRO++ with zero.stage={c.stage}",
        options=lambda c: choices({"zero.stage": 3}, {"zero.stage": 3, "model.compile": False}),
        hint="leave the keys out of the JSON",
    ),
    Rule(
        id="hpz-neighbours",
        title="hpZ needs `parallel.tp` and `parallel.cp` 1",
        why="DeepSpeed builds its groups from neighbouring ranks, which would hold different slices of the model",
        broken=lambda c: c.hpz > 1 and c.tp * c.cp > 1,
        what=lambda c: f"zero_hpz_partition_size={c.hpz} with parallel.tp={c.tp} and parallel.cp={c.cp}",
        options=lambda c: choices(
            {"parallel.tp": 1, "parallel.cp": 1}, {"parallel.tp": 1, "parallel.cp": 1, "parallel.sequence_parallel": False}
        ),
        hint="leave zero_hpz_partition_size out of the JSON",
    ),
    Rule(
        id="hpz-dp",
        title="hpZ's group size divides dp",
        why="the data-parallel ranks fall into groups of that size",
        broken=lambda c: c.hpz > 1 and c.dp > 0 and c.tp * c.cp == 1 and c.dp % c.hpz != 0,
        what=lambda c: f"zero_hpz_partition_size={c.hpz} does not divide {c.dp} data-parallel ranks",
        options=lambda c: choices({"zero.deepspeed.zero_optimization.zero_hpz_partition_size": "auto"}),
    ),
    Rule(
        id="qgz-ranks",
        title="`zero_quantized_gradients` needs `parallel.tp`, `parallel.pp` and `parallel.cp` 1",
        why="its all-to-all runs over whole machines, so gradients of different parameters would be mixed",
        broken=lambda c: c.qgz and c.tp * c.pp * c.cp > 1,
        what=lambda c: f"zero_quantized_gradients=true with parallel.tp={c.tp}, parallel.pp={c.pp} and parallel.cp={c.cp}",
        options=lambda c: choices(
            {"zero.deepspeed.zero_optimization.zero_quantized_gradients": False},
            {"parallel.tp": 1, "parallel.pp": 1, "parallel.cp": 1, "parallel.vpp": 1, "parallel.sequence_parallel": False},
        ),
    ),
    Rule(
        id="quantized-cuda",
        title="ZeRO++'s quantisation needs CUDA",
        why="DeepSpeed quantises with CUDA kernels",
        broken=lambda c: (c.qwz or c.qgz) and not c.cuda,
        what=lambda c: "zero_quantized_weights or zero_quantized_gradients on a machine without CUDA",
        options=lambda c: choices(
            {
                "zero.deepspeed.zero_optimization.zero_quantized_weights": False,
                "zero.deepspeed.zero_optimization.zero_quantized_nontrainable_weights": False,
                "zero.deepspeed.zero_optimization.zero_quantized_gradients": False,
            }
        ),
    ),
    Rule(
        id="warm-up",
        title="`optimizer.warmup_steps` is at most `train.steps`",
        why="the run would end before the learning rate reaches its peak",
        broken=lambda c: c.warmup > c.steps,
        what=lambda c: f"optimizer.warmup_steps={c.warmup} exceeds train.steps={c.steps}",
        options=warm_ups,
    ),
    Rule(
        id="decay",
        title="linear and cosine: `optimizer.decay_steps` > `optimizer.warmup_steps`; wsd: warm-up and decay fit into `train.steps`",
        why="warm-up and decay would overlap",
        broken=lambda c: c.decay_overlaps(),
        what=lambda c: (
            f"optimizer.decay_steps={c.decay or 'null'} with schedule {c.schedule}, warmup_steps={c.warmup} and train.steps={c.steps}"
        ),
        options=warm_ups,
    ),
    Rule(
        id="eval-steps",
        title="`train.eval_every` > 0 needs `train.eval_steps` > 0",
        why="an evaluation over no batch has no loss",
        broken=lambda c: c.eval_every > 0 and c.eval_steps == 0,
        what=lambda c: f"train.eval_every={c.eval_every} with train.eval_steps=0",
        options=lambda c: choices({"train.eval_steps": 1}, {"train.eval_every": 0}),
    ),
    Rule(
        id="eval-split",
        title="`train.eval_every` > 0 needs a validation share in `data.split`",
        why="there is nothing to evaluate on",
        broken=lambda c: c.eval_every > 0 and not c.has_valid,
        what=lambda c: f"train.eval_every={c.eval_every} with 0 as the second weight of data.split",
        options=lambda c: choices({"train.eval_every": 0}, {"data.split": (98, 1, 1)}),
    ),
)

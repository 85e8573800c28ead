"""What becomes of each key of a DeepSpeed JSON: the table that the code acts on and docs/deepspeed.md shows.

A key is in one of four states. mapped: it moves into a key of the YAML. honoured: DeepSpeed is
given it and acts on it in a run
here. passed: DeepSpeed is given it as it is; the note says where it has an effect. refused: a value
that would change something ends the start with the reason, since no part of a run here would act on
it, or acting on it would break or bend the run. Names are those of DeepSpeed 0.19;
tests/config/test_deepspeed_table.py holds them against the installed package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from toolkit.arch.optimizers import OPTIMIZERS

State = Literal["mapped", "honoured", "passed", "refused"]

SIZE, SWITCH, ANY = "a whole number >= 0", "true or false", "a value"


class Key(NamedTuple):
    """What happens to a key. note: what it means here, or why it is refused; fix: what to set instead.

    yaml: the YAML key that a mapped one moves into; same: its value moves there as it is. accepts:
    what a value must be.
    off: values that switch the key off, beside null, false, 0, an empty mapping and "auto";
    none_off: nothing but `off` does so.
    """

    state: State
    note: str = ""
    fix: str = ""
    yaml: str = ""
    same: bool = False
    accepts: str = ANY
    off: tuple[Any, ...] = ()
    none_off: bool = False


def _same(yaml: str, note: str = "") -> Key:
    return Key("mapped", note, yaml=yaml, same=True)


def _mapped(yaml: str, note: str) -> Key:
    return Key("mapped", note, yaml=yaml)


def _honoured(note: str, accepts: str = ANY) -> Key:
    return Key("honoured", note, accepts=accepts)


def _passed(note: str, accepts: str = ANY) -> Key:
    return Key("passed", note, accepts=accepts)


def _refused(why: str, fix: str = "Leave it out", *, off: tuple[Any, ...] = (), none_off: bool = False, accepts: str = ANY) -> Key:
    return Key("refused", why, fix, off=off, none_off=none_off, accepts=accepts)


def _all(names: str, key: Key) -> dict[str, Key]:
    return dict.fromkeys(names.split(), key)


def _within(section: str, keys: dict[str, Key]) -> dict[str, Key]:
    return {f"{section}.{name}": key for name, key in keys.items()}


_AUTOCAST = _refused("it changes the precision behind train.precision's back", "Set train.precision to bf16 or fp16")
_ORDER = _refused("the order of the data follows from run.seed and the step alone")
_EXPERTS = _refused("the models here have no experts")
_REMOVED = _refused("DeepSpeed has removed it")
_REDUCED = "gradients are reduced in their own precision and divided alike in every layout, at stages 0 and 1 by the toolkit itself"
_PROFILE = "Use the toolkit's profile command, which measures every rank"
_OWN_CHECKPOINTS = "the toolkit writes its own checkpoints and never calls DeepSpeed's"
_DS_SAVE = _passed("for DeepSpeed's own save and load functions, which a run here does not call", SWITCH)
_WHOLE = "recomputed layers keep their inputs whole, on the device"

TOP: dict[str, Key] = {
    "train_batch_size": _same("train.global_batch_size", "sequences per optimizer step over all ranks"),
    "train_micro_batch_size_per_gpu": _same("train.micro_batch_size", "sequences per forward pass of one data-parallel rank"),
    "gradient_accumulation_steps": _mapped(
        "train.global_batch_size", "checked: it must be what the batch and the layout make it; DeepSpeed is given 1"
    ),
    "gradient_clipping": _same("train.grad_clip", "largest global gradient norm"),
    "steps_per_print": _honoured("steps between DeepSpeed's own lines; left out: none", SIZE),
    "memory_breakdown": _passed("DeepSpeed prints memory around its own step", SWITCH),
    "dump_state": _passed("DeepSpeed prints its settings at the start", SWITCH),
    "log_level": _passed("of DeepSpeed's own log"),
    "disable_python_gc": _honoured("no garbage collection by Python while training", SWITCH),
    "disable_allgather": _passed("DeepSpeed 0.19 reads it and does nothing with it", SWITCH),
    "vocabulary_size": _passed("DeepSpeed only warns where it is no multiple of 8"),
    "zero_allow_untested_optimizer": _honoured("set to true: the optimizer is made here"),
    "zero_force_ds_cpu_optimizer": _passed("the optimizer of offloaded states is DeepSpeed's already"),
    "managed_gradient_accumulation": _refused("megatron-core's schedule accumulates the micro-batches", "Set train.global_batch_size"),
    "prescale_gradients": _refused(_REDUCED, accepts=SWITCH),
    "gradient_predivide_factor": _refused(_REDUCED, off=(1,)),
    "gradient_allreduce_op": _refused(
        "a sum instead of a mean would make the result depend on the number of processes", 'Set it to "mean"', off=("mean",)
    ),
    "communication_data_type": _refused(_REDUCED),
    "seq_parallel_communication_data_type": _refused("DeepSpeed's sequence parallelism is not used here", off=("fp32",)),
    "sparse_gradients": _refused("sparse gradients are not reduced over tensor and pipeline ranks"),
    "amp": _AUTOCAST,
    "torch_autocast": _AUTOCAST,
    "pipeline": _refused("it belongs to DeepSpeed's own pipeline engine, which is not used here", "Set parallel.pp and parallel.vpp"),
    "wall_clock_breakdown": _refused(
        "DeepSpeed's timers stand around a forward and a backward that megatron-core's schedule replaces", _PROFILE, accepts=SWITCH
    ),
    "flops_profiler": _refused(
        "it counts what passes through DeepSpeed's own forward: nothing at stages 0 and 1, parts of a step above", _PROFILE
    ),
    "comms_logger": _refused(
        "it sees DeepSpeed's collectives alone, and not those of tensor and pipeline parallelism", f"{_PROFILE}, traffic by group included"
    ),
    "timers": _refused("DeepSpeed's throughput timer stands in a forward that megatron-core's schedule replaces", _PROFILE),
    "checkpoint": _refused(_OWN_CHECKPOINTS, "Use the checkpoint section of the YAML"),
    "datastates_ckpt": _refused(_OWN_CHECKPOINTS, "Use the checkpoint section of the YAML"),
    "nebula": _REMOVED,
    "dataloader_drop_last": _refused("batches come from the toolkit's own loader, and all are whole", accepts=SWITCH),
    "data_efficiency": _ORDER,
    "curriculum_learning": _ORDER,
    "elasticity": _refused("it would change the global batch with the number of processes", "Set train.global_batch_size"),
    "moe": _EXPERTS,
    "expert_parallel": _EXPERTS,
    "use_data_before_expert_parallelism": _EXPERTS,
    "sequence_parallel_size": _refused(
        "DeepSpeed's sequence parallelism would split the ranks a second time",
        "Set parallel.sequence_parallel or parallel.cp",
        off=(1,),
    ),
    "tensor_parallel": _refused("megatron-core splits the layers", "Set parallel.tp", off=({"autotp_size": 0}, {"autotp_size": 1})),
    "compile": _refused("DeepCompile rewrites the graph that megatron-core's schedule drives", "Set model.compile"),
    "autotuning": _refused("it would start runs of its own", "Use the toolkit's tune command"),
    "hybrid_engine": _refused("it replaces the layers for generation"),
    "compression_training": _refused("it changes weights and layers during training"),
    "weight_quantization": _refused("it changes the weights that are trained"),
    **_all("quantize_training progressive_layer_drop eigenvalue sparse_attention graph_harvesting", _REMOVED),
}

HALF: dict[str, Key] = {
    **_within(
        "fp16",
        {
            "enabled": _mapped("train.precision", "true: fp16; false, as bf16's: fp32"),
            "loss_scale": _honoured("0: dynamic; otherwise the fixed scale"),
            "initial_scale_power": _honoured("the dynamic scale starts at 2 to this power"),
            "loss_scale_window": _honoured("steps without overflow before the scale doubles"),
            "hysteresis": _honoured("overflows that are forgiven before the scale halves"),
            "consecutive_hysteresis": _honoured("whether hysteresis starts anew after each step without overflow"),
            "min_loss_scale": _honoured("the scale does not fall below"),
            "auto_cast": _refused("the inputs are token ids, which are not cast"),
            "fp16_master_weights_and_grads": _passed("keeps the optimizer's copy of the weights in 16 bits; needs CPU offload"),
        },
    ),
    **_within(
        "bf16",
        {
            "enabled": _mapped("train.precision", "true: bf16; false, as fp16's: fp32"),
            "check_grad_overflow": _honoured("whether a step with a non-finite gradient is skipped; left out: true"),
            "immediate_grad_update": _passed("of DeepSpeed's own bf16 optimizer"),
            "bf16_master_weights_and_grads": _passed("keeps the optimizer's copy of the weights in 16 bits"),
            "bf16_optimizer_states": _passed("keeps Adam's moments in 16 bits"),
        },
    ),
    **_within("bfloat16", {"enabled": _mapped("train.precision", "the old name of bf16")}),
    **_within(
        "data_types",
        {
            "grad_accum_dtype": _honoured("gradients are added up in it at stages 2 and 3; left out: fp32"),
            "param_dtype": _refused("train.precision says it", "Set train.precision"),
            "buffer_dtype": _passed("of the model's buffers, such as the rotary frequencies"),
            "keep_in_fp32_modules": _passed("names of modules whose buffers stay in fp32"),
        },
    ),
}

_OPTIMIZER = {
    "type": _mapped("optimizer.name", f"{' or '.join(name for o in OPTIMIZERS.values() for name in o.json)}; others are refused"),
    "params": _mapped("optimizer", "lr, weight_decay, betas, eps, momentum, nesterov: those that the optimizer has"),
    "legacy_fusion": _refused("the optimizer is made here"),
}
_SCHEDULER = {
    "type": _mapped("optimizer.schedule", "WarmupLR: constant; WarmupDecayLR: linear; others are refused"),
    "params": _mapped("optimizer", "warmup_num_steps, warmup_max_lr, total_num_steps; the warm-up is linear and starts from 0"),
}

_CHECKPOINTING = {
    "number_checkpoints": _mapped("train.recompute", "as many as the model has layers: full; other numbers are refused"),
    "partition_activations": _refused(_WHOLE, "Set train.recompute, and parallel.sequence_parallel to split them over the tensor ranks"),
    "cpu_checkpointing": _refused(_WHOLE, "Set train.recompute to full"),
    "contiguous_memory_optimization": _refused(_WHOLE, "Set train.recompute to full"),
    "synchronize_checkpoint_boundary": _refused("it stands in DeepSpeed's own recomputation; megatron-core's is used"),
    "profile": _refused("it stands in DeepSpeed's own recomputation; megatron-core's is used", _PROFILE),
}

MONITORS: dict[str, Key] = {
    **_within("tensorboard", {"enabled": _same("log.tensorboard"), **_all("output_path job_name", _honoured("where the files go"))}),
    **_within("wandb", {"enabled": _same("log.wandb"), **_all("group team project", _honoured("as W&B names them"))}),
    **_within("csv_monitor", {"enabled": _same("log.csv"), **_all("output_path job_name", _honoured("where the files go"))}),
    **_within(
        "comet",
        _all(
            "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
            _passed("DeepSpeed writes the step's values to Comet"),
        ),
    ),
}

_AIO = {
    "block_size": _honoured("bytes of one request to the disk", SIZE),
    "queue_depth": _honoured("requests in flight", SIZE),
    "intra_op_parallelism": _honoured("threads of one swap", SIZE),
    "single_submit": _honoured("one request at a time", SWITCH),
    "overlap_events": _honoured("submit and wait at the same time", SWITCH),
    "use_gds": _passed("GPUDirect Storage; has not been run here", SWITCH),
}

_STAGE_3 = {
    "prefetch_bucket_size": "parameter elements gathered ahead of use",
    "param_persistence_threshold": "parameters of fewer elements stay whole on every rank",
    "model_persistence_threshold": "elements that may stay whole in all",
    "max_live_parameters": "parameter elements that are whole at once",
    "max_reuse_distance": "a parameter used again within so many elements stays whole",
    "module_granularity_threshold": "modules of fewer elements are gathered as one",
}
_OFFLOAD = {
    "buffer_count": _honoured("buffers of the swap to disk"),
    "pin_memory": _honoured("page-locked host memory"),
    "fast_init": _passed("of the optimizer's states on NVMe"),
}

ZERO: dict[str, Key] = {
    "stage": _same("zero.stage"),
    "reduce_bucket_size": _passed("elements of one reduction at stages 2 and 3; stages 0 and 1 reduce all gradients at once", SIZE),
    "allgather_bucket_size": _honoured("elements of one gather of parameters", SIZE),
    "sub_group_size": _honoured("elements per optimizer step and per swap to disk, stage 3", SIZE),
    **{f"{prefix}{name}": _honoured(f"stage 3: {note}", SIZE) for name, note in _STAGE_3.items() for prefix in ("stage3_", "")},
    "zero_hpz_partition_size": _honoured("hpZ: ranks that hold a second copy of the parameters, stage 3", SIZE),
    "zero_quantized_weights": _honoured("qwZ: gather parameters in int8, stage 3 on CUDA", SWITCH),
    "zero_quantized_nontrainable_weights": _honoured("the same for weights that are not trained", SWITCH),
    "zero_quantized_gradients": _honoured("qgZ: reduce gradients in int4, stage 3 on CUDA", SWITCH),
    "contiguous_gradients": _passed("gradients in one buffer, stages 2 and 3", SWITCH),
    "reduce_scatter": _passed("each rank receives its share of the gradients only, stages 2 and 3", SWITCH),
    "use_multi_rank_bucket_allreduce": _passed("one reduction for several ranks' shares, stages 2 and 3", SWITCH),
    "allgather_partitions": _honoured("gather updated parameters in one collective", SWITCH),
    "overlap_comm": _passed("reduce while the backward pass goes on, stages 2 and 3; off at 0 and 1, which reduce once", SWITCH),
    "round_robin_gradients": _passed("ranks copy different gradients to the host at the same time, stages 2 and 3", SWITCH),
    "parameter_alignment": _passed("pads parameters within their buffer", ANY),
    "ignore_unused_parameters": _passed("every parameter here has a gradient", SWITCH),
    "memory_efficient_linear": _passed("of torch's linear layers, which megatron-core's replace", SWITCH),
    "override_module_apply": _passed("while a model is built under DeepSpeed's own context", SWITCH),
    "log_trace_cache_warnings": _passed("of stage 3's record of the order of modules", SWITCH),
    "enable_sanity_checks": _passed("of stage 3", SWITCH),
    "leaf_module": _passed("modules that stage 3 gathers as one"),
    "save_muon_momentum_buffer_in_memory": _passed("of DeepSpeed's Muon, which is not used here", SWITCH),
    **_all("stage3_use_all_reduce_for_fetch_params use_all_reduce_for_fetch_params", _honoured("gather by all-reduce, stage 3", SWITCH)),
    **_all("stage3_allgather_sequential allgather_sequential", _honoured("gather one parameter at a time, stage 3", SWITCH)),
    **_all("load_from_fp32_weights pipeline_loading_checkpoint legacy_stage1", _DS_SAVE),
    **_all(
        "stage3_gather_16bit_weights_on_model_save gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save",
        _DS_SAVE,
    ),
    "compute_grad_norm": _refused("every step reports and checks the gradient norm", off=(True, None), none_off=True),
    "zenflow": _refused("it updates with gradients of earlier steps, so the result would change"),
    "elastic_checkpoint": _refused("DeepSpeed no longer supports it"),
    "cpu_offload": _refused("DeepSpeed has renamed it", 'Write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": _refused("DeepSpeed has renamed it", 'Write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": _refused("DeepSpeed has renamed it", 'Write "pin_memory" in the offload sections'),
    "mics_shard_size": _refused("DeepSpeed has removed it", "Use zero_hpz_partition_size"),
    **_all("mics_hierarchical_params_gather zeropp_loco_param", _REMOVED),
    **_within(
        "offload_optimizer",
        {
            "device": _same("zero.offload_optimizer"),
            "nvme_path": _same("zero.nvme_path"),
            **_OFFLOAD,
            "pipeline_read": _honoured("read the next states while the step computes"),
            "pipeline_write": _honoured("write the last states while the step computes"),
            "ratio": _honoured("share of the states that is offloaded, stage 3"),
            "super_offload": _passed("of stage 3; has not been run here"),
            "cpuadam_cores_perc": _passed("share of the cores for super_offload"),
        },
    ),
    **_within(
        "offload_param",
        {
            "device": _same("zero.offload_param"),
            "nvme_path": _same("zero.nvme_path"),
            **_OFFLOAD,
            "buffer_size": _honoured('elements of one buffer; "auto" or left out: the largest weight\'s part that a rank keeps'),
            "max_in_cpu": _honoured("parameter elements kept in host memory under NVMe offload"),
        },
    ),
}

KEYS: dict[str, Key] = {
    **TOP,
    **HALF,
    **_within("optimizer", _OPTIMIZER),
    **_within("scheduler", _SCHEDULER),
    **_within("activation_checkpointing", _CHECKPOINTING),
    **_within("aio", _AIO),
    **MONITORS,
    **_within("zero_optimization", ZERO),
}
SAME = {name: key.yaml for name, key in KEYS.items() if key.same}


def sections() -> dict[str, dict[str, Key]]:
    """Every section with keys of its own in the table ("" for the top level, which names the
    sections too), outer ones first.
    """
    found: dict[str, dict[str, Key]] = {"": {}}
    for name, key in KEYS.items():
        parent, _, last = name.rpartition(".")
        found.setdefault(parent, {})[last] = key
    for name in [section for section in found if section]:
        parent, _, last = name.rpartition(".")
        found[parent].setdefault(last, Key("honoured", "a section"))
    return dict(sorted(found.items(), key=lambda item: item[0].count(".") + bool(item[0])))


def names(state: State, among: Iterable[str] = KEYS) -> list[str]:
    """The keys in one state."""
    return [name for name in among if KEYS[name].state == state]

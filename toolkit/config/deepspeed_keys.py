"""What a DeepSpeed JSON may hold: the keys DeepSpeed knows, and those that would break or bend a run here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.config.describe import show
from toolkit.config.explain import nearest
from toolkit.config.yaml_text import read_text
from toolkit.errors import ConfigError


def _words(text: str) -> list[str]:
    return text.split()


# Names as of DeepSpeed 0.19: only used to recognise misspellings, since DeepSpeed ignores unknown top-level keys
TOP_LEVEL = frozenset(
    _words("""
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation optimizer scheduler
    communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
    sparse_gradients fp16 bf16 bfloat16 amp torch_autocast gradient_clipping zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown dump_state flops_profiler activation_checkpointing aio autotuning
    tensorboard wandb csv_monitor comet comms_logger compression_training data_efficiency curriculum_learning checkpoint data_types
    elasticity pipeline hybrid_engine compile memory_breakdown disable_allgather disable_python_gc dataloader_drop_last log_level
    weight_quantization tensor_parallel expert_parallel use_data_before_expert_parallelism vocabulary_size timers datastates
    progressive_layer_drop eigenvalue sparse_attention quantize_training sequence_parallel_size moe nebula graph_harvesting
    """)
)

_SIZE, _SWITCH, _ANY = "a whole number >= 0", "true or false", "a value"
ZERO: Mapping[str, str] = {
    **dict.fromkeys(
        _words("""
        reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold
        stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold
        prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance
        module_granularity_threshold zero_hpz_partition_size
        """),
        _SIZE,
    ),
    **dict.fromkeys(
        _words("""
        contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm compute_grad_norm
        load_from_fp32_weights elastic_checkpoint gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save
        stage3_gather_fp16_weights_on_model_save stage3_use_all_reduce_for_fetch_params use_all_reduce_for_fetch_params
        stage3_allgather_sequential allgather_sequential ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment
        zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
        pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
        save_muon_momentum_buffer_in_memory
        """),
        _SWITCH,
    ),
    **dict.fromkeys(
        _words("stage offload_param offload_optimizer zenflow cpu_offload cpu_offload_param cpu_offload_use_pin_memory leaf_module"), _ANY
    ),
}
_SCALARS = {
    "steps_per_print": _SIZE,
    **dict.fromkeys(_words("prescale_gradients wall_clock_breakdown memory_breakdown dump_state disable_allgather"), _SWITCH),
}
_OFFLOAD = dict.fromkeys(
    _words("""
    device nvme_path buffer_count buffer_size max_in_cpu pin_memory pipeline_read pipeline_write fast_init ratio super_offload
    cpuadam_cores_perc
    """),
    _ANY,
)
_HALF = dict.fromkeys(
    _words("""
    enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale
    fp16_master_weights_and_grads immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states
    """),
    _ANY,
)
_SECTIONS: Mapping[str, Mapping[str, str]] = {
    "zero_optimization": ZERO,
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "fp16": _HALF,
    "bf16": _HALF,
}

# key: (why it cannot stay, what to set); harmless values (null, false, {}, "enabled": false, and those listed below) are dropped
REFUSED: Mapping[str, tuple[str, str]] = {
    "pipeline": ("it belongs to DeepSpeed's own pipeline engine, which is not used here", "Set parallel.pp and parallel.vpp"),
    "managed_gradient_accumulation": ("megatron-core's schedule accumulates the micro-batches", "Set train.global_batch_size"),
    "gradient_allreduce_op": ("a sum instead of a mean would make the result depend on the number of processes", 'Set it to "mean"'),
    "sparse_gradients": ("sparse gradients are not reduced over tensor and pipeline ranks", "Leave it out"),
    "amp": ("it changes the precision behind train.precision's back", "Set train.precision to bf16 or fp16"),
    "torch_autocast": ("it changes the precision behind train.precision's back", "Set train.precision to bf16 or fp16"),
    "data_efficiency": ("the order of the data follows from run.seed and the step alone", "Leave it out"),
    "curriculum_learning": ("the order of the data follows from run.seed and the step alone", "Leave it out"),
    "elasticity": ("it would change the global batch with the number of processes", "Set train.global_batch_size"),
    "moe": ("the models here have no experts", "Leave it out"),
    "expert_parallel": ("the models here have no experts", "Leave it out"),
    "use_data_before_expert_parallelism": ("the models here have no experts", "Leave it out"),
    "sequence_parallel_size": (
        "DeepSpeed's sequence parallelism would split the ranks a second time",
        "Set parallel.sequence_parallel or parallel.cp",
    ),
    "tensor_parallel": ("megatron-core splits the layers", "Set parallel.tp"),
    "compile": ("DeepCompile rewrites the graph that megatron-core's schedule drives", "Set model.compile"),
    "autotuning": ("it would start runs of its own", "Use the toolkit's tune command"),
    "hybrid_engine": ("it replaces the layers for generation", "Leave it out"),
    "compression_training": ("it changes weights and layers during training", "Leave it out"),
    "weight_quantization": ("it changes the weights that are trained", "Leave it out"),
    "quantize_training": ("DeepSpeed has removed it", "Leave it out"),
    "progressive_layer_drop": ("DeepSpeed has removed it", "Leave it out"),
    "eigenvalue": ("DeepSpeed has removed it", "Leave it out"),
    "sparse_attention": ("DeepSpeed has removed it", "Leave it out"),
    "graph_harvesting": ("DeepSpeed has removed it", "Leave it out"),
    "nebula": ("DeepSpeed has removed it", "Leave it out"),
    "zero_optimization.cpu_offload": ("DeepSpeed has renamed it", 'Write "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": ("DeepSpeed has renamed it", 'Write "offload_param": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_use_pin_memory": ("DeepSpeed has renamed it", 'Write "pin_memory" in the offload sections'),
    "zero_optimization.compute_grad_norm": ("every step reports and checks the gradient norm", "Leave it out"),
    "zero_optimization.zenflow": ("it updates with gradients of earlier steps, so the result would change", "Leave it out"),
    "zero_optimization.elastic_checkpoint": ("DeepSpeed no longer supports it", "Leave it out"),
    "zero_optimization.mics_shard_size": ("DeepSpeed has removed it", "Use zero_hpz_partition_size"),
    "zero_optimization.mics_hierarchical_params_gather": ("DeepSpeed has removed it", "Leave it out"),
    "zero_optimization.zeropp_loco_param": ("DeepSpeed has removed it", "Leave it out"),
}
_HARMLESS: Mapping[str, tuple[Any, ...]] = {  # where "off" is not null, false, 0 or {}
    "gradient_allreduce_op": ("mean",),
    "sequence_parallel_size": (1,),
    "tensor_parallel": ({"autotp_size": 0}, {"autotp_size": 1}),
    "zero_optimization.compute_grad_norm": (True, None),
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON; raises ConfigError that names line and column, or a key given twice."""
    name = show(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(f"DeepSpeed JSON {name} has the key {show(key)} twice", fix="Remove one.")
            seen[key] = value
        return seen

    try:
        data = json.loads(read_text(path, kind="DeepSpeed JSON"), object_pairs_hook=once, parse_constant=_no_constant)
    except json.JSONDecodeError as e:
        why = f"{e.msg} (JSON has no comments and no commas at the end of a list)"
        raise ConfigError(
            f"DeepSpeed JSON {name}, line {e.lineno}, column {e.colno} is not valid JSON", why=why, fix="Correct that line."
        ) from None
    except (ValueError, RecursionError) as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise ConfigError(f"DeepSpeed JSON {name} cannot be read", why=why, fix="Correct the file.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"DeepSpeed JSON {name} holds {show(data)}, not an object", fix='Start it with "{".')
    return data


def copied(data: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A deep copy; raises ConfigError where a value is not JSON."""
    try:
        text = json.dumps(data, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
        copy: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as e:
        raise ConfigError(f"{source} cannot be written as JSON", why=str(e), fix="Use numbers, strings, lists and mappings only.") from None
    return copy


def check_keys(data: dict[str, Any], *, source: str) -> None:
    """Refuse misspelt keys and those that would break a run, and drop those that are switched off; changes data."""
    _check_spelling(data, {**dict.fromkeys([*TOP_LEVEL, *REFUSED], _ANY), **_SCALARS}, prefix="", source=source)
    for section, known in _SECTIONS.items():
        holder, name = _holder(data, section)
        body = holder.get(name) if holder is not None else None
        if body is None:
            continue
        if not isinstance(body, dict):
            raise ConfigError(f"{section}={show(body)} in {source} is not an object", fix=f'Write "{name}": {{...}}.')
        inner = {key.rpartition(".")[2]: _ANY for key in REFUSED if key.startswith(section + ".")}
        _check_spelling(body, {**inner, **known}, prefix=section + ".", source=source)
    for key, (why, fix) in REFUSED.items():
        holder, name = _holder(data, key)
        if holder is None or name not in holder:
            continue
        value = holder.pop(name)
        off = value == "auto" or value in _HARMLESS.get(key, ())
        if key != "zero_optimization.compute_grad_norm":
            off = off or not value or (isinstance(value, dict) and value.get("enabled") is False)
        if key == "compile" and isinstance(value, dict) and not value.get("deepcompile"):
            off = True
        if not off:
            raise ConfigError(f"{key}={show(value)} in {source} cannot be used", why=why, fix=f"{fix}.")


def _check_spelling(body: dict[str, Any], known: Mapping[str, str], *, prefix: str, source: str) -> None:
    for key, value in body.items():
        if key not in known:
            if near := nearest(key.lower(), known, cutoff=0.8):
                raise ConfigError(
                    f"{prefix}{show(key)[1:-1]} in {source} looks misspelt",
                    why="DeepSpeed would ignore or refuse it",
                    fix=f"Did you mean {prefix}{near}?",
                )
            continue
        wanted = known[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wrong = (
            not isinstance(value, bool)
            if wanted == _SWITCH
            else not number or value < 0 or value != int(value)
            if wanted == _SIZE
            else False
        )
        if wrong and value not in ("auto", None):
            raise ConfigError(f"{prefix}{key}={show(value)} in {source} is not accepted", fix=f"Set it to {wanted}.")


def _holder(data: dict[str, Any], dotted: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that would hold a dotted key, and the key's last name."""
    *parents, name = dotted.split(".")
    at: Any = data
    for parent in parents:
        at = at.get(parent) if isinstance(at, dict) else None
    return (at if isinstance(at, dict) else None), name


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")

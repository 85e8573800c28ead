"""The DeepSpeed JSON that is given to DeepSpeed: the YAML's keys and the user's own, for one layout."""

from __future__ import annotations

from typing import Any

from toolkit.config.deepspeed import accumulation, hpz_group, merge_deepspeed_json, partition
from toolkit.config.deepspeed_keys import copied
from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError
from toolkit.parallel.layout import Layout

NEVER = 10**9  # DeepSpeed prints a line once in so many steps: the loop prints better ones


def deepspeed_config(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """The whole configuration DeepSpeed gets, with no "auto" left.

    DeepSpeed sees one micro-batch per step: megatron-core's schedule accumulates, and divides by
    the number of micro-batches. So train_batch_size is micro_batch_size x dp x cp. Raises
    ConfigError where the user's JSON asks for another accumulation.
    """
    config = merge_deepspeed_json(config)
    rest: dict[str, Any] = copied(config.zero.deepspeed or {}, source="zero.deepspeed")
    wanted = accumulation(config)
    if wanted is not None and wanted != layout.num_microbatches:
        raise ConfigError(
            f"gradient_accumulation_steps={wanted} in the DeepSpeed JSON contradicts train.global_batch_size={config.train.global_batch_size}",
            why=f"with train.micro_batch_size={layout.micro_batch_size} and {layout.dp} data-parallel ranks it makes "
            f"{layout.num_microbatches} micro-batches",
            fix=f'Set it to {layout.num_microbatches} or "auto".',
        )
    zero = _zero_section(config, layout, rest.pop("zero_optimization", {}))
    result: dict[str, Any] = {
        **rest,
        "train_batch_size": layout.micro_batch_size * layout.copies,  # DeepSpeed takes context-parallel ranks for data-parallel ones
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.grad_clip,  # always: DeepSpeed's default is 1.0, not off
        "bf16": {**rest.get("bf16", {}), "enabled": config.train.precision == "bf16"},
        "fp16": {**rest.get("fp16", {}), "enabled": config.train.precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER if rest.get("steps_per_print") in ("auto", None) else rest["steps_per_print"],
        **_monitors(config, rest),
    }
    return _without_auto(result)


def _zero_section(config: RunConfig, layout: Layout, rest: dict[str, Any]) -> dict[str, Any]:
    zero, h = config.zero, config.model.hidden_size
    auto = {  # Hugging Face's values, so that a JSON written for its Trainer behaves the same
        "reduce_bucket_size": h * h,
        "stage3_prefetch_bucket_size": h * h * 9 // 10,
        "stage3_param_persistence_threshold": 10 * h,
        "zero_hpz_partition_size": hpz_group(tp=layout.tp, cp=layout.cp, dp=layout.dp),
    }
    section: dict[str, Any] = {name: auto[name] if value == "auto" and name in auto else value for name, value in rest.items()}
    section["stage"] = zero.stage
    for name, device in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        options: dict[str, Any] = section.pop(name, {})
        if name == "offload_param" and device == "nvme" and options.get("buffer_size") in ("auto", None):
            # DeepSpeed's 1e8 elements are too few for a large model on few ranks, and waste memory otherwise
            options["buffer_size"] = partition(*config.model.spec.largest_weights(), tp=layout.tp, dp=layout.copies)
        if device != "none":
            section[name] = {**options, "device": device, **({"nvme_path": str(zero.nvme_path)} if device == "nvme" else {})}
    return section


def _monitors(config: RunConfig, rest: dict[str, Any]) -> dict[str, Any]:
    logs, name = str(config.run.dir / "logs"), config.run.dir.name or "run"
    monitors = {
        "tensorboard": (config.log.tensorboard, {"output_path": logs, "job_name": "tensorboard"}),
        "wandb": (config.log.wandb, {"project": "toolkit", "group": name}),
        "csv_monitor": (config.log.csv, {"output_path": logs, "job_name": "csv"}),
    }
    return {key: {**defaults, **rest.get(key, {}), "enabled": on} if on else {"enabled": False} for key, (on, defaults) in monitors.items()}


def _without_auto(value: Any) -> Any:
    """Without the keys still "auto": DeepSpeed's own default applies there."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if not (isinstance(inner, str) and inner == "auto")}
    return value

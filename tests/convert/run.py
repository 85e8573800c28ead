"""A run that starts from imported weights, on every rank of a pool's world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml

from tests.checkpoint.run import Sequences, prepared
from tests.convert.models import TOKENS, tokens


def config_of(folder: Path, keys: dict[str, Any], *, run: Path) -> dict[str, Any]:
    """The YAML that an import wrote, with other keys set."""
    raw = yaml.safe_load((folder / "config.yaml").read_text())
    raw["checkpoint"]["init_from"] = str(folder)  # the file names its own folder as "."
    raw["run"]["dir"] = str(run)
    raw["train"] |= {"seq_length": TOKENS, "steps": 1, "global_batch_size": 2}
    raw["optimizer"] = {"lr": 0.0, "schedule": "constant"}
    for dotted, value in keys.items():
        section, key = dotted.split(".")
        raw.setdefault(section, {})[key] = value
    return raw


def start(raw: dict[str, Any]) -> Any:
    """Engine and schedule of a run, as the training loop makes them."""
    from toolkit.checkpoint.session import Checkpoints
    from toolkit.checkpoint.start import starting_weights
    from toolkit.config.load import parse_config
    from toolkit.engine.zero import Engine, partitioner
    from toolkit.model.build import build_chunks
    from toolkit.parallel.deepspeed_json import deepspeed_config
    from toolkit.parallel.rules import check
    from toolkit.train.world import World, connect

    config = parse_config(raw)
    world = World.from_environment()
    layout = check(config, world.size)
    connect(world, layout, seed=config.run.seed)
    checkpoints = Checkpoints(config, layout, prepared(config.run.dir), weights=starting_weights(config))
    ds_config = deepspeed_config(config, layout)
    blank = checkpoints.weights is not None
    chunks = build_chunks(config, layout, device=world.device, partition=partitioner(config, ds_config), blank=blank)
    engine = Engine(chunks, config, layout, ds_config)
    checkpoints.attach(engine, Sequences())
    return config, layout, checkpoints, engine


@torch.no_grad()
def logits(raw: dict[str, Any]) -> np.ndarray | None:
    """Logits [b, s, padded vocabulary] of the model that a run starts with; on the last stage, None elsewhere.

    raw: the YAML, and as "tokens" a file of ids [b, s], if not the usual ones.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    given = raw.pop("tokens", None)
    config, layout, checkpoints, engine = start(raw)
    engine.evaluation(True)  # GPT-2 comes with dropout
    ids = tokens(config.model.vocab_size) if given is None else torch.from_numpy(np.load(given))
    positions = torch.arange(ids.shape[1]).expand_as(ids)

    def step(_: Any, view: Any) -> Any:
        return view(ids, positions, None), lambda output, **_: output

    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(engine.views) if len(engine.views) > 1 else None,
        model=engine.views if len(engine.views) > 1 else engine.views[0],
        num_microbatches=layout.pp,  # an interleaved schedule needs a round of them
        seq_length=ids.shape[1],
        micro_batch_size=len(ids),
        forward_only=True,
        collect_non_loss_data=True,
    )
    checkpoints.release()
    if not found:
        return None
    parts = [torch.empty_like(found[0]) for _ in range(layout.tp)]
    dist.all_gather(parts, found[0].contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1).float().numpy()


def one_step(raw: dict[str, Any]) -> float:
    """Train one step and save it; the loss."""
    from tests.parity.run import micro_batches
    from toolkit.engine.schedule import Schedule
    from toolkit.runfolder.metrics import StepRecord

    config, layout, checkpoints, engine = start(raw)
    t = config.train
    schedule = Schedule(engine.views, layout, seq_length=t.seq_length, micro_batch_size=t.micro_batch_size)
    at = layout.coordinates(dist.get_rank())
    micro = list(micro_batches(config, layout, at.dp, 1))
    engine.set_lr(config.optimizer.lr)
    engine.begin()
    loss = schedule(lambda: iter(micro), num_microbatches=layout.num_microbatches)
    engine.finish()
    total = torch.zeros(()) if loss is None or at.tp else loss / layout.dp
    dist.all_reduce(total)
    checkpoints.save(StepRecord(1, 0.0, 0.0, 0.0, 0, 0.0, 0.0, None, 0.0, 0.0, 0.0), last=True)
    checkpoints.commit()
    checkpoints.settle()
    checkpoints.release()
    return float(total)

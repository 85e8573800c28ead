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
from tests.rank import Rank


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


def start(raw: dict[str, Any]) -> Rank:
    """A run that starts from what its checkpoint.init_from names."""
    return Rank(raw, data=(prepared(Path(raw["run"]["dir"])), Sequences()))


@torch.no_grad()
def logits(raw: dict[str, Any]) -> np.ndarray | None:
    """Logits [b, s, padded vocabulary] of the model that a run starts with; on the last stage, None
    elsewhere.

    raw: the YAML, and as "tokens" a file of ids [b, s], if not the usual ones.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    given = raw.pop("tokens", None)
    rank = start(raw)
    config, layout, checkpoints, engine = rank.config, rank.layout, rank.checkpoints, rank.engine
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
    from toolkit.runfolder.metrics import StepRecord

    rank = start(raw)
    rank.engine.set_lr(rank.config.optimizer.lr)
    loss, _ = rank.step(1)
    rank.checkpoints.save(StepRecord(1, 0.0, 0.0, 0.0, 0, 0.0, 0.0, None, 0.0, 0.0, 0.0), last=True)
    rank.checkpoints.commit()
    rank.checkpoints.settle()
    rank.checkpoints.release()
    return loss

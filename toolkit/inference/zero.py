"""DeepSpeed's ZeRO-Inference: the copies of a model share out its layers, whose parts may wait in
the CPU's memory or on NVMe.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from toolkit.config.schema import RunConfig
from toolkit.engine.zero import bring_weights, partitioner, release
from toolkit.model.sharded import ShardedLayers
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.parallel.layout import Layout

DEVICES = {"zero": "none", "zero-cpu": "cpu", "zero-nvme": "nvme"}


class Sharding:
    """Shares out weights over the data-parallel ranks. place: as --offload has it; nvme_path: the
    folder of zero-nvme.

    Two layers are whole at once: the one that is computed, and the next, which comes meanwhile.
    """

    def __init__(self, config: RunConfig, layout: Layout, *, place: str, nvme_path: str | None) -> None:
        sizes = [math.prod(w.cut.part(w.shape, layout.tp)) for w in config.model.spec.layer]
        settings: dict[str, Any] = {
            "stage3_param_persistence_threshold": 10 * config.model.hidden_size,  # norms and biases stay whole
            "stage3_prefetch_bucket_size": sum(sizes),
            "stage3_max_live_parameters": 2 * sum(sizes),
        }
        if place == "zero-nvme":
            settings["offload_param"] = {"buffer_count": 2 * len(sizes)}
        asked = {"stage": 3, "offload_param": DEVICES[place], "deepspeed": {"zero_optimization": settings}}
        zero = config.zero.model_copy(update={**asked, "nvme_path": Path(nvme_path) if nvme_path else None})
        self.config = config.model_copy(update={"zero": zero})
        self.ds_config = deepspeed_config(self.config, layout)
        partition = partitioner(self.config, self.ds_config, trains=False)
        assert partition is not None
        self.partition = partition
        self.engine: Any = None

    def engage(self, layers: ShardedLayers) -> None:
        """Have the layers' weights come as they are called."""
        self.engine = bring_weights(layers, self.ds_config, whole=layers.WHOLE)

    def close(self) -> None:
        """Let go of DeepSpeed's engine."""
        if self.engine is not None:
            release(self.engine)
            self.engine = None

"""Written by `python -m tests.bench.planner --fit`; do not edit. What it means: toolkit/cost/spread.py."""

SPREADS: dict[str, dict[str, tuple[float, float]]] = {
    "time": {
        "all": (-0.1275, 0.1275),
        "deepspeed": (-0.3653, 0.3653),
        "deepspeed, offload": (-0.5149, 0.5149),
        "fsdp": (-0.0693, 0.0693),
        "megatron": (-0.1201, 0.1201),
        "megatron-deepspeed": (-0.1485, 0.1485),
        "nemo": (-0.0759, 0.0759),
        "offload": (-0.4775, 0.4775),
        "plain": (-0.1766, 0.1766),
    },
    "memory": {
        "all": (-0.1125, 0.1125),
        "deepspeed": (-0.1096, 0.1096),
        "deepspeed, offload": (-0.4167, 0.4167),
        "fsdp": (-0.0823, 0.0823),
        "megatron": (-0.0601, 0.0601),
        "megatron-deepspeed": (-0.1267, 0.1267),
        "offload": (-0.3399, 0.3399),
        "plain": (-0.152, 0.152),
        "toolkit": (-0.1302, 0.1572),
        "toolkit, ZeRO-0": (-0.0649, 0.05),
        "toolkit, ZeRO-1": (-0.0593, 0.05),
        "toolkit, ZeRO-1, offload": (-0.0685, 0.1486),
        "toolkit, ZeRO-2": (-0.1687, 0.1395),
        "toolkit, ZeRO-3": (-0.1803, 0.1733),
        "toolkit, ZeRO-3, offload": (-0.186, 0.3106),
    },
}
COMPARISON = 0.0473

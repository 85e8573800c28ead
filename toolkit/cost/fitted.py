"""Written by `python -m tests.bench.planner --fit`; do not edit. What each means: toolkit/cost/constants.py."""

FITTED = {
    "old_communicator": 322123000.0,
    "spare": 0.05,
    "pipeline_spare": 0.25,
    "unmerged": 1.0,
    "wave_tail": 0.3,
    "misaligned": 0.15,
    "fused_traffic": 1.4,
    "eager_traffic": 1.8,
    "operator_host": 8e-06,
    "contention": 0.3,
    "sharded_hidden": 0.9,
    "half_hidden": 0.2,
    "whole_hidden": 0.8,
    "node_spread": 0.008,
}

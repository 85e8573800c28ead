"""What ranks on GPUs set for themselves."""

from __future__ import annotations

from toolkit.cluster.environment import cuda_defaults


def test_segments_grow_and_tensor_parallel_kernels_keep_their_order() -> None:
    found = cuda_defaults(tp=2, zero_stage=1, environ={})
    assert found == {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_what_the_user_has_set_stays() -> None:
    own = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert cuda_defaults(tp=2, zero_stage=1, environ=own) == {}


def test_no_order_is_forced_where_nothing_gains_by_it() -> None:
    for tp, stage in ((1, 1), (2, 3)):
        assert "CUDA_DEVICE_MAX_CONNECTIONS" not in cuda_defaults(tp=tp, zero_stage=stage, environ={})

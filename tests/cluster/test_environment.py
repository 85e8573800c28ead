"""What ranks on GPUs set for themselves, and what those of other hosts get."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.cluster.environment import cuda_defaults, users_variables
from toolkit.doctor.hosts import probe_line
from toolkit.errors import ConfigError


def test_segments_grow_and_tensor_parallel_kernels_keep_their_order() -> None:
    found = cuda_defaults(tp=2, zero_stage=1, environ={})
    assert found == {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_what_the_user_has_set_stays() -> None:
    own = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert cuda_defaults(tp=2, zero_stage=1, environ=own) == {}


def test_no_order_is_forced_where_nothing_gains_by_it() -> None:
    for tp, stage in ((1, 1), (2, 3)):
        assert "CUDA_DEVICE_MAX_CONNECTIONS" not in cuda_defaults(tp=tp, zero_stage=stage, environ={})


def test_a_users_own_file_goes_to_other_hosts_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "NCCL_DEBUG=INFO\nA=1\n"), (here, "A = b=c\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert users_variables({}) == {"NCCL_DEBUG": "INFO", "A": "b=c"}
    assert "A=b=c" in probe_line({"OMP_NUM_THREADS": "3"}) and "OMP_NUM_THREADS" not in probe_line({"OMP_NUM_THREADS": "3"})
    assert users_variables({"DS_ENV_FILE": str(here / "none")}) == {}


def test_a_line_at_which_the_launcher_would_fail_is_named(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("A=1\n\n# more\n")
    with pytest.raises(ConfigError, match=r"env:2 is ''"):
        users_variables({"DS_ENV_FILE": str(tmp_path / "env")})

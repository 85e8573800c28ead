"""The launcher: its command, the environment it gives, exit codes and signals, with real ranks on
this machine.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from toolkit.cluster import launch
from toolkit.cluster.environment import deepspeed_env_lines, device_ids, export_environment, rank_environment
from toolkit.cluster.launch import local_command
from toolkit.errors import ConfigError, MachineError

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = "tests.cluster.smoke"
CPU = {"CUDA_VISIBLE_DEVICES": "-1", "PATH": os.environ["PATH"]}
START = """
import logging, os, sys
from toolkit.cluster import launch
launch.SECOND_SIGNAL_S = float(os.environ["SECOND_SIGNAL_S"])
logging.basicConfig(format="toolkit: %(message)s")
sys.exit(launch.run_local("c.yaml", sys.argv[2:], num_procs=int(sys.argv[1]), module="tests.cluster.smoke"))
"""


def test_a_free_port_is_none_that_the_kernel_gives_away(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Path("/proc/sys/net/ipv4/ip_local_port_range")
    assert not kernel.exists() or launch.PORTS[-1] < int(kernel.read_text().split()[0])
    port = launch.free_port()
    monkeypatch.setattr(launch, "PORTS", range(port, port + 1))
    with socket.socket() as taken:
        taken.bind(("", port))
        with pytest.raises(MachineError, match=f"from {port} to {port}"):
            launch.free_port()


def start(*args: str, second_signal_s: float = 60.0) -> subprocess.Popen[str]:
    """second_signal_s: seconds after which another signal counts as a second one."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "-1", "SECOND_SIGNAL_S": str(second_signal_s)}
    return subprocess.Popen(
        [sys.executable, "-c", START, *args], env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 240
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not appear: {sorted(p.name for p in folder.iterdir())}"
        time.sleep(0.05)


def ranks_of(marker: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if any(marker in word for word in _cmdline(p))]


def ranks_left(marker: str) -> list[psutil.Process]:
    """Ranks that do not end: the pipe closes a moment before the process is gone."""
    deadline = time.monotonic() + 60
    while (left := ranks_of(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_the_local_command_starts_deepspeeds_launcher_for_each_rank() -> None:
    command = local_command("c.yaml", ["train.steps=3"], num_procs=3, environ=CPU)
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert command[-3:] == ["toolkit.train", "c.yaml", "train.steps=3"]
    world = next(word.split("=", 1)[1] for word in command if word.startswith("--world_info="))
    assert len(json.loads(base64.urlsafe_b64decode(world))["localhost"]) == 3


def test_importing_the_launcher_does_not_import_torch() -> None:
    code = "import sys, toolkit.cluster.launch, toolkit.cluster.locks\n"
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'deepspeed', 'megatron')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("num_procs", [0, -1])
def test_no_process_is_refused(num_procs: int) -> None:
    with pytest.raises(ConfigError, match=f"num_procs={num_procs}"):
        local_command("c.yaml", num_procs=num_procs)


def test_hidden_gpus_stay_hidden_from_the_ranks() -> None:
    for visible in ("", "-1"):
        assert device_ids(2, environ={"CUDA_VISIBLE_DEVICES": visible}) == ["-1", "-1"]


def test_threads_are_shared_among_the_ranks_unless_the_user_said_otherwise() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert rank_environment(1, environ=CPU)["OMP_NUM_THREADS"] == str(cores)
    assert rank_environment(1000, environ=CPU)["OMP_NUM_THREADS"] == "1"
    assert rank_environment(1, environ={**CPU, "OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert rank_environment(1, environ=CPU)["DS_ACCELERATOR"] == "cpu"


def test_the_interpreters_own_tools_are_on_the_ranks_path() -> None:
    path = rank_environment(1, environ={"PATH": "/usr/bin"}, python="/env/bin/python")["PATH"]
    assert path.split(os.pathsep) == ["/env/bin", "/usr/bin"]


def test_exported_lines_hold_what_ranks_need_and_no_secret() -> None:
    environ = {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "HF_HOME": "/data/a b",
        "TOKENIZERS_PARALLELISM": "0",
    }
    others = {"HF_TOKEN": "x", "WANDB_API_KEY": "x", "EDITOR": "vi", "HOME": "/home/a", "DS_ENV_FILE": "f", "TORCH_LOGS": ""}
    assert deepspeed_env_lines({**environ, **others}) == [f"{name}={environ[name]}" for name in sorted(environ)]


@pytest.mark.parametrize("value", ["$HOME", 'a"b', "a`b`", "a\\b", "100%n", "a\nb"])
def test_a_value_that_a_shell_would_change_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="NCCL_DEBUG"):
        deepspeed_env_lines({"NCCL_DEBUG": value})


def test_the_exported_file_can_be_read_by_deepspeed(tmp_path: Path) -> None:
    lines = export_environment(tmp_path / "new" / "env", environ={"GLOO_SOCKET_IFNAME": "eth0", "HF_HOME": "/a=b"})
    read = [line.split("=", maxsplit=1) for line in (tmp_path / "new" / "env").read_text().splitlines()]
    assert read == [["GLOO_SOCKET_IFNAME", "eth0"], ["HF_HOME", "/a=b"]] and len(lines) == 2


def test_the_ranks_message_and_exit_code_are_all_the_user_gets() -> None:
    process = start("2", "exit=2")
    output, _ = process.communicate(timeout=900)
    lines = output.splitlines()
    assert process.returncode == 2, output
    assert sorted(line.split(" host=")[0] for line in lines[:2]) == ["rank 0 of 2", "rank 1 of 2"]
    assert all("sum=3" in line and line.endswith("argument=c.yaml") for line in lines[:2])
    assert lines[2:] == ["the one message"]


def test_a_killed_rank_is_said_to_be_killed() -> None:
    process = start("1", "kill=0")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 128 + signal.SIGKILL and "toolkit: the run was ended by SIGKILL" in output


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_every_rank_finish_its_step(tmp_path: Path, signum: signal.Signals) -> None:
    process = start("2", f"wait={tmp_path}")
    wait_for(tmp_path, "ready-0", "ready-1")
    process.send_signal(signum)
    time.sleep(0.1)
    process.send_signal(signum)  # as `timeout` does: to the process, then to its group
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0 and (tmp_path / "stopped-0").exists() and (tmp_path / "stopped-1").exists(), output
    assert not ranks_left(str(tmp_path))


def test_a_second_signal_kills(tmp_path: Path) -> None:
    process = start("2", f"wait={tmp_path}", "deaf=1", second_signal_s=launch.SECOND_SIGNAL_S)
    wait_for(tmp_path, "ready-0", "ready-1")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert any("a second signal kills them" in line for line in process.stdout)  # its handler has run
    time.sleep(1.1 * launch.SECOND_SIGNAL_S)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 128 + signal.SIGKILL, output
    assert not (tmp_path / "stopped-0").exists() and not ranks_left(str(tmp_path))


def test_ranks_do_not_outlive_a_killed_toolkit(tmp_path: Path) -> None:
    process = start("1", f"wait={tmp_path}")
    wait_for(tmp_path, "ready-0")
    process.kill()
    wait_for(tmp_path, "stopped-0")
    process.communicate(timeout=900)  # ends when the last rank has closed its output
    assert not ranks_left(str(tmp_path))

"""Hostfiles, and hosts that ssh does not reach."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from toolkit.cluster.environment import deepspeed_env_lines
from toolkit.cluster.hosts import check_reachable, read_hostfile
from toolkit.cluster.launch import cluster_command, main
from toolkit.errors import MachineError, ToolkitError

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_hostfile_gives_slots_in_the_order_of_ranks(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# comment\nb slots=2\n\na   slots=4 \n")
    assert list(read_hostfile(file).items()) == [("b", 2), ("a", 4)]
    command = cluster_command("c.yaml", ["x=1"], hostfile=file, master_addr="10.0.0.1")
    assert command[0] == "deepspeed" and command[command.index("--master_addr") + 1] == "10.0.0.1" and command[-2:] == ["c.yaml", "x=1"]


@pytest.mark.parametrize(
    "text,named",
    [
        (None, "no hostfile"),
        ("# nothing\n", "names no host"),
        ("a\n", ":1 is 'a'"),
        ("a slots=0\n", ":1"),
        ("a slots=1\na slots=2\n", ":2"),
    ],
)
def test_a_wrong_hostfile_is_named(tmp_path: Path, text: str | None, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ToolkitError, match=named):
        read_hostfile(file)
    assert main(["--hostfile", str(file), "--env-file", str(tmp_path / "env")]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "env").exists()


def test_the_shipped_hostfile_and_variables_are_readable() -> None:
    assert read_hostfile(REPOSITORY / "launch" / "hostfile.example") == {"node-1": 8, "node-2": 8}
    for line in (REPOSITORY / "launch" / "deepspeed_env.example").read_text().splitlines():
        assert deepspeed_env_lines(dict([line.split("=", 1)])) == [line]


@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh client")
def test_a_host_that_ssh_does_not_reach_is_named() -> None:
    with pytest.raises(
        MachineError, match=r"host node-1\.invalid of the hostfile is not reachable by ssh: .*Make `ssh node-1\.invalid true` work"
    ):
        check_reachable(["node-1.invalid"])

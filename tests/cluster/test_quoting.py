"""Names, paths and overrides reach a rank as they were given, whatever shells lie between: nothing
in them is ever executed.

Each command line that the project makes is run by a real `sh -c` (or bash), with a program that
prints its arguments in the place of python. DeepSpeed's lines are those of its own runner.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.cluster.hosts import read_hostfile
from toolkit.cluster.jobs import Job, Pods, mpijob, slurm_script, torchrun_command, trainjob
from toolkit.cluster.launch import cluster_command, launcher_environment, main
from toolkit.cluster.words import UNQUOTABLE, check_exports, check_host, packed, unpacked
from toolkit.config.yaml_text import read_yaml
from toolkit.doctor import hosts
from toolkit.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = settings(max_examples=25)
# what a process can be given at all; with a taste for what shells act on
CHARACTERS = st.one_of(st.sampled_from(list(" '\"`$\\;&|<>(){}[]*?~#!%=,\n\t-")), st.characters(exclude_characters="\x00", codec="utf-8"))
HOSTILE = [
    "a;touch CANARY",
    "$(touch CANARY)",
    "`touch CANARY`",
    "a' ; touch CANARY ; '",
    'a" ; touch CANARY ; "',
    "-x",
    "",
    "base64:eA==",
    "%h %n",
]
WORDS = st.one_of(st.sampled_from(HOSTILE), st.text(CHARACTERS, max_size=20))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to run lines in, with the printing program; no line may leave another file there."""
    folder = tmp_path_factory.mktemp("quoting")
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$PRINTED"\n')
    (folder / "python").chmod(0o755)
    (folder / "srun").write_text('#!/bin/sh\nwhile case "$1" in --*) true;; *) false;; esac; do shift; done\nexec "$@"\n')
    (folder / "srun").chmod(0o755)
    (folder / "scontrol").write_text("#!/bin/sh\necho node-1\n")
    (folder / "scontrol").chmod(0o755)
    before = {p.name for p in folder.iterdir()}
    yield folder
    assert {p.name for p in folder.iterdir()} - before <= {"printed"}, "a line has executed what it was given"


def printed(line: str, place: Path, *, shell: str = "sh") -> list[str]:
    """The arguments that the printing program got from a line."""
    path = place / "printed"
    path.unlink(missing_ok=True)
    environ = {"PATH": f"{place}:/usr/bin:/bin", "PRINTED": str(path), "SLURM_JOB_NODELIST": "node-1", "SLURM_JOB_ID": "7"}
    environ |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    done = subprocess.run([shell, "-c", line], cwd=place, env=environ, capture_output=True)
    assert done.returncode == 0, done.stderr
    return path.read_bytes().decode().split("\0")[:-1]


def pdsh_line(command: list[str], place: Path) -> str:
    """What DeepSpeed's runner gives to the shell of each host for a `deepspeed …` command of ours."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    args = parse_args(command[1:])
    args.master_addr = args.master_addr or "node-1"
    words, _, _ = PDSHRunner(args, "d29ybGQ=").get_cmd({}, {"node-1": [0], "node-2": [0]})
    return " ".join(words[words.index("node-1,node-2") + 1 :])


@EXAMPLES
@given(word=WORDS)
def test_a_packed_word_is_plain_and_comes_back(word: str) -> None:
    there = packed(word)
    assert unpacked(there) == word and shlex.split(there) == [there] and not set(there) & set("$`\"'\\;&|<>()%~*?[]{} \n")


@EXAMPLES
@given(words=st.lists(WORDS, max_size=4), config=st.text(CHARACTERS, min_size=1, max_size=20).filter(lambda t: not t.startswith("-")))
def test_the_launchers_line_for_other_hosts(words: list[str], config: str, place: Path) -> None:
    hostfile = REPOSITORY / "launch" / "hostfile.example"
    command = cluster_command(config, words, hostfile=hostfile, master_addr="node-1")
    # the dry run prints a line for this host's shell; there `deepspeed` is the program that prints
    assert printed(shlex.join([str(place / "python"), *command[1:]]), place) == command[1:]
    got = printed(pdsh_line(command, place).replace(sys.executable, str(place / "python")), place)
    assert [unpacked(word) for word in got[got.index("toolkit.train") + 1 :]] == [config, *words]


@EXAMPLES
@given(words=st.lists(WORDS, max_size=4), name=st.text(CHARACTERS, max_size=12))
def test_slurm_torchrun_and_kubernetes(words: list[str], name: str, place: Path) -> None:
    from toolkit.supervise.commands import _plain

    job = Job(
        config="c d.yaml", overrides=tuple(words), name=_plain(name), nodes=1, ranks_per_node=1, gpus=False, python=str(place / "python")
    )
    expected = ["-u", "-m", "toolkit.train", "c d.yaml", *words]
    assert printed(slurm_script(job), place, shell="bash") == expected
    assert printed(shlex.join(torchrun_command(job, master_addr=None)), place)[-len(words) - 2 :] == expected[2:]
    trainer = read_yaml(trainjob(job, Pods(image="i")), source="job")["spec"]["trainer"]
    launcher = read_yaml(mpijob(job, Pods(image="i")), source="job")["spec"]["mpiReplicaSpecs"]["Launcher"]
    for got in (trainer["args"], launcher["template"]["spec"]["containers"][0]["command"][-len(words) - 1 :]):
        assert [word.replace("$$(", "$(") for word in got] == [word.replace("$$(", "$(") for word in expected[3:]]
        assert not any("$(" in word.replace("$$(", "") for word in got), "Kubernetes would replace it"


@EXAMPLES
@given(value=st.text(CHARACTERS, min_size=1, max_size=20), folder=st.text(CHARACTERS, min_size=1, max_size=10))
def test_the_probes_line(value: str, folder: str, place: Path) -> None:
    line = hosts.probe_line(
        {"NCCL_DEBUG": value, "PYTHONPATH": value, "HF_TOKEN": "secret"}, folder=str(place), python=str(place / "python")
    )
    assert printed(line, place) == ["-u", "-m", "toolkit.doctor.probe"] and "secret" not in line
    missing = hosts.probe_line({}, folder=f"/nowhere/{folder}", python=str(place / "python"))
    assert subprocess.run(["sh", "-c", missing], cwd=place).returncode == hosts.NO_FOLDER


@given(value=st.text(CHARACTERS, min_size=1, max_size=20))
@EXAMPLES
def test_an_exported_value_arrives_or_is_refused(value: str, place: Path) -> None:
    from deepspeed.launcher.multinode_runner import MultiNodeRunner

    try:
        check_exports({"NCCL_DEBUG": value}, ["NCCL_DEBUG"])
    except ConfigError:
        assert UNQUOTABLE.search(value)
        return
    exports: dict[str, str] = {}
    runner = argparse.Namespace(exports=exports)
    MultiNodeRunner.add_export(runner, "NCCL_DEBUG", value)  # type: ignore[arg-type]
    assert printed(f'export NCCL_DEBUG={exports["NCCL_DEBUG"]}; python "$NCCL_DEBUG"', place) == [value.strip()]


@pytest.mark.parametrize("name", ["a;reboot", "-oProxyCommand=reboot", "$(reboot)", "a,b", "a|b", "u@-x"])
def test_what_is_no_name_of_a_host_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"{name} slots=1\n")
    with pytest.raises(ConfigError, match="not the name of a host"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(ConfigError, match="--master-addr"):
        cluster_command("c.yaml", hostfile=REPOSITORY / "launch" / "hostfile.example", master_addr=name)


@pytest.mark.parametrize("name", ["node-1", "user@node-1.cluster", "10.0.0.1", "fe80::1", "gpu_04"])
def test_names_of_hosts(name: str) -> None:
    assert check_host(name, where="it") == name


def test_a_variable_whose_name_is_a_command_is_refused() -> None:
    with pytest.raises(ConfigError, match="name that no shell exports"):
        check_exports({"PYTHON;reboot": "1"}, ["PYTHON;reboot"])


def test_secrets_that_deepspeed_would_export_stay_here() -> None:
    environ = {"MLFLOW_TRACKING_TOKEN": "x", "MLFLOW_TRACKING_URI": "http://m", "HF_TOKEN": "y", "PATH": "/bin"}
    env = launcher_environment(environ)
    assert "MLFLOW_TRACKING_TOKEN" not in env and env["MLFLOW_TRACKING_URI"] == "http://m", "DeepSpeed exports MLFLOW*"
    assert env["HF_TOKEN"] == "y", "it exports nothing of this name, and rank 0's host may need it"


def test_a_folder_that_the_launcher_would_tear_apart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a;touch b").mkdir()
    monkeypatch.chdir(tmp_path / "a;touch b")
    with pytest.raises(ConfigError, match="the working folder"):
        cluster_command("c.yaml", hostfile=REPOSITORY / "launch" / "hostfile.example")


def test_the_script_packs_its_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostfile = str(REPOSITORY / "launch" / "hostfile.example")
    arguments = ["--hostfile", hostfile, "--env-file", str(tmp_path / "env"), "--master-addr", "", "--", "c.yaml", "a=$(x)\n", "--b"]
    assert main(arguments) == 0
    assert [unpacked(word) for word in capsys.readouterr().out.splitlines()] == ["c.yaml", "a=$(x)\n", "--b"]
    # the script itself, up to the launcher, for which a program stands that prints
    (tmp_path / "deepspeed").write_text('#!/bin/sh\nprintf "%s\\n" "$@" "token: $MLFLOW_TRACKING_TOKEN"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin", "HOSTFILE": hostfile}
    environ |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_TOKEN": "secret"}
    script = [str(REPOSITORY / "launch" / "multi-node.sh"), "c.yaml", "data.blend={a b: 1}", "x=$(reboot)"]
    done = subprocess.run(script, env=environ, cwd=REPOSITORY, capture_output=True, text=True)
    words = done.stdout.splitlines()
    assert [unpacked(word) for word in words[words.index("toolkit.train") + 1 :]] == ["c.yaml", *script[2:], "token: "], done.stderr

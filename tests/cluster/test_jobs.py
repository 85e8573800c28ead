"""What `toolkit launch` hands to other launchers and schedulers: accepted by them, quoted, and
refused where it cannot work.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from toolkit.cli import app
from toolkit.cluster.jobs import Job, Pods, mpijob, slurm_script, torchrun_command, trainjob
from toolkit.errors import ConfigError, ToolkitError

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = "launch/recipes/quickstart.yaml"
# the table of launch/README.md: a shipped file, and the command that prints it
EXAMPLES = dict(re.findall(r"^\| \[(\S+)\].*\| `toolkit launch (.*)` \|$", (REPOSITORY / "launch" / "README.md").read_text(), re.M))


def job(*overrides: str, name: str = "run", nodes: int = 2) -> Job:
    return Job(
        config="/shared/run.yaml", overrides=overrides, name=name, nodes=nodes, ranks_per_node=4, gpus=True, python="/env/bin/python"
    )


def strictly(schema: Any) -> Any:
    """The schema as kubectl applies it: a field that it does not name is an error."""
    if isinstance(schema, list):
        return [strictly(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: strictly(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and schema["properties"]:
        strict.setdefault("additionalProperties", False)
    return strict


def accepted(text: str, kind: str) -> dict[str, Any]:
    published = json.loads((Path(__file__).parent / "schemas" / f"{kind}.json").read_text())
    manifest = yaml.safe_load(text)
    assert manifest["apiVersion"] == f"{published['group']}/{published['version']}" and manifest["kind"] == published["kind"]
    schema = strictly(published["schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, not part of the definition
    jsonschema.validate(manifest, schema)
    return manifest


def launch(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["launch", *words])
    if isinstance(done.exception, ToolkitError):
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.output


@pytest.mark.parametrize("write, kind", [(trainjob, "trainjob"), (mpijob, "mpijob")])
def test_a_kubernetes_job_fits_the_published_schema(write: Any, kind: str) -> None:
    pods = Pods(image="i:1", namespace="ml", volumes=(("data", "/data"), ("results", "/results")), variables={"NCCL_DEBUG": "INFO"})
    manifest = accepted(write(job("parallel.tp=2", name="Llama 3_8b!"), pods), kind)
    assert manifest["metadata"] == {"name": "llama-3-8b", "namespace": "ml"}
    assert "parallel.tp=2" in json.dumps(manifest) and '"claimName": "results"' in json.dumps(manifest)


def test_the_check_of_the_schema_can_fail() -> None:
    wrong = trainjob(job(), Pods(image="i:1")).replace("numNodes", "nodes")
    with pytest.raises(jsonschema.ValidationError):
        accepted(wrong, "trainjob")


ANY_WORD = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=30)


@settings(max_examples=25, deadline=None)
@given(words=st.lists(ANY_WORD, max_size=3))
def test_no_word_of_an_override_reaches_a_shell_unquoted(words: list[str]) -> None:
    script = slurm_script(job(*words))
    # what bash would give to srun, printed instead
    body = 'srun() { printf "%s\\0" "$@"; }\n' + script[script.index("srun ") :]
    said = subprocess.run(["bash", "-c", body], capture_output=True)
    assert said.stderr == b"" and said.stdout.decode().split("\0")[-len(words) - 2 : -1] == ["/shared/run.yaml", *words]
    command = torchrun_command(job(*words, nodes=1), master_addr=None)
    assert shlex.split(shlex.join(command))[-len(words) - 1 :] == ["/shared/run.yaml", *words]


@pytest.mark.parametrize("option", ["partition=a b", "comment=x\n#SBATCH --uid=0", "--", "A=$(id)#", "Partition=x"])
def test_an_option_that_would_not_stay_one_directive_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="not an option of sbatch"):
        slurm_script(job(), options=[option])


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_shipped_examples_are_what_the_command_prints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("toolkit.cluster.launch.os.geteuid", lambda: 1000)
    code, output = launch(*shlex.split(EXAMPLES[name]), "--dry-run")
    assert code == 0, output
    assert (REPOSITORY / "launch" / name).read_text() == output.replace(sys.executable, "python")


def test_every_way_to_start_has_an_example() -> None:
    assert {Path(name).stem for name in EXAMPLES} == {"slurm", "trainjob", "mpijob", "torchrun", "openmpi", "no-ssh"}


WRONG = {
    (): "no way to start is given",
    ("--slurm", "--torchrun"): "--slurm and --torchrun are given",
    ("--slurm", "--image", "i"): "--image beside --slurm: it belongs to --k8s",
    ("--k8s",): "--k8s has no --image",
    ("--k8s", "--image", "i", "--kind", "pod"): "--kind 'pod' is not known. Set it to trainjob or mpijob.",
    ("--k8s", "--image", "i", "--volume", "data"): "--volume data is not CLAIM:/PATH",
    ("--k8s", "--image", "i", "--env", "A-B=1"): "--env 'A-B' is not NAME=VALUE",
    ("--slurm", "--nodes", "0"): "--nodes 0 is less than 1",
    ("--slurm", "--ranks-per-node", "1"): "parallel.tp=2",
    ("--torchrun", "--nodes", "2", "--ranks-per-node", "1"): "--torchrun on 2 nodes has no --master-addr",
    ("--torchrun", "--restarts", "-1"): "--restarts -1 is less than 0",
    ("--slurm", "--nodes", "3", "--ranks-per-node", "2"): "train.global_batch_size=16 is no multiple",
    ("--hostfile", "/none"): "there is no hostfile /none",
    ("--hostfile", "launch/hostfile.example", "--runner", "ssh"): "--runner 'ssh' is not known. Set it to pdsh or openmpi.",
    ("--hostfile", "launch/hostfile.example", "--node-rank", "9"): "--node-rank 9 is not a host",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_cannot_be_started_is_one_message(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    code, message = launch(RECIPE, *words, "--dry-run")
    assert code == 2 and WRONG[words] in message and "\n" not in message.strip()

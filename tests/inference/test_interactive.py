"""A conversation goes on where devices come and go, and the answers are those of one process;
--auto says what it chose.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.inference.asking import answers, made  # noqa: E402
from toolkit.errors import ConfigError  # noqa: E402
from toolkit.inference.auto import choice_for, with_choice  # noqa: E402
from toolkit.inference.interactive import Conversation, converse  # noqa: E402
from toolkit.inference.request import Request  # noqa: E402

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
NEW = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made(tmp_path_factory.mktemp("talk"), layers=6, max_position_embeddings=512)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def goes_on(pool: Pool, folder: Path, text: str, new: int = NEW) -> list[int]:
    """What one process goes on with after a text."""
    ((tokens, _),) = answers(pool, folder, ids=[list(text.encode())], new=new)
    return list(tokens)


def request_of(folder: Path, **more: Any) -> Request:
    return Request(**{"model": str(folder), "prompts": [], "tokenizer": "bytes", "max_new_tokens": NEW, **more})


def test_a_rank_that_dies_in_an_answer_leaves_the_conversation_whole(folder: Path, pool: Pool) -> None:
    """Killed when its first words are on the screen: the model is cut over what is left, and
    nothing is shown twice.
    """
    talk = Conversation(request_of(folder, chat=True, max_new_tokens=60), devices=2)
    shown: list[str] = []
    notes: list[str] = []
    talk.note = notes.append
    killed = False

    def show(piece: str) -> None:
        nonlocal killed
        shown.append(piece)
        if not killed:
            killed = True
            assert talk.ranks is not None and len(talk.ranks.processes) == 2
            talk.ranks.processes[1].kill()

    try:
        answer = talk.say("who?", show=show)
    finally:
        talk.close()
    assert answer["tokens"] == goes_on(pool, folder, "<user>who?\n<assistant>", 60)
    assert "".join(shown) == answer["text"] and talk.cut == "tp 1 x pp 1" and len(talk.messages) == 2
    assert any("rank 1 has ended by SIGKILL; going on with 1 of 2 devices" in note for note in notes), notes


@pytest.mark.all_cells
def test_layers_leave_a_rank_that_becomes_slower(pool: Pool, tmp_path: Path) -> None:
    """Its core is given to busy processes too: the cut moves between prompts, and the answers stay
    those of one process.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("on one core every rank becomes slower")
    folder = made(tmp_path, layers=8, width=512, max_position_embeddings=256)
    talk = Conversation(request_of(folder, rebalance=True, overrides=["parallel.pp=2"], memory_limit=4.0), devices=2)
    notes: list[str] = []
    talk.note = notes.append
    wanted = goes_on(pool, folder, "ab")
    busy: list[subprocess.Popen[bytes]] = []
    try:
        assert talk.say("ab")["tokens"] == wanted
        assert talk.ranks is not None
        for pids, core in (([talk.ranks.processes[0].pid], cores[0]), ([talk.ranks.processes[1].pid], cores[-1])):
            for thread in (t for pid in pids for t in Path(f"/proc/{pid}/task").iterdir()):
                os.sched_setaffinity(int(thread.name), {core})
        for _ in range(4):
            busy.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            os.sched_setaffinity(busy[-1].pid, {cores[-1]})
        deadline = time.monotonic() + 240
        while talk.ranks.layers_per_stage[1] >= 4 and time.monotonic() < deadline:
            talk.again()
            assert talk.say("ab")["tokens"] == wanted
        assert talk.ranks.layers_per_stage[1] < 4, notes
        talk.again()
        assert talk.say("ab")["tokens"] == wanted
    finally:
        for process in busy:
            process.kill()
            process.wait()
        talk.close()
    assert any("re-cut from 4,4 to" in note and "ms a layer" in note for note in notes), notes


@pytest.mark.all_cells
def test_devices_come_and_go(folder: Path, pool: Pool) -> None:
    """1 → 2 → 3 → 2 processes within one conversation, as typed."""
    lines = io.StringIO("one\n/devices 2\ntwo\n/devices 3\nthree\n\n/devices 2\nfour\n/what\n/new\nfive\n")
    out = io.StringIO()
    converse(request_of(folder, chat=True, as_json=True), devices=1, fixed=(), lines=lines, out=out)
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [a["prompt"] for a in said] == ["one", "two", "three", "four", "five"]
    assert [sum(map(int, a["cut"].replace("tp ", "").replace("pp ", "").split(" x "))) for a in said] == [2, 3, 4, 3, 3]
    text = ""
    for answer in said:
        text = ("" if answer["prompt"] == "five" else text) + f"<user>{answer['prompt']}\n<assistant>"
        assert answer["tokens"] == goes_on(pool, folder, text), answer
        text += answer["text"] + "\n"


def test_choices_follow_devices_and_memory(folder: Path) -> None:
    request = request_of(folder, prompts=["ab"])
    whole = choice_for(request, devices=1)
    assert whole.way.world == 1 and "the plain model fits" in whole.reasons[0]
    assert choice_for(request, devices=3, spread=True).way.pp == 3 and choice_for(request, devices=2, spread=True).way.world == 2
    assert choice_for(replace(request, overrides=["parallel.tp=2"]), devices=2).way.tp == 2
    weights = whole.memory.worst.weights / 2**30
    tight = choice_for(replace(request, memory_limit=0.8 * weights), devices=1, fixed=["weights"])
    assert tight.way.offload == "disk" and any("the plain model does not fit" in r for r in tight.reasons)
    chosen = with_choice(request, tight)
    assert chosen.offload == "disk" and chosen.auto == tight.reasons and chosen.overrides == ["parallel.tp=1", "parallel.pp=1"]
    with pytest.raises(ConfigError, match="fits in no way"):
        choice_for(replace(request, memory_limit=1e-6), devices=1)
    with pytest.raises(ConfigError, match=r"parallel\.vpp=2"):
        choice_for(replace(request, overrides=["parallel.vpp=2"]), devices=1)


@pytest.mark.all_cells
def test_auto_runs_what_it_chose(folder: Path, pool: Pool) -> None:
    command = [sys.executable, "-m", "toolkit", "generate", str(folder), "--tokenizer", "bytes", "--prompt", "ab", "--json", "--auto"]
    command += ["--max-new-tokens", str(NEW), "--num-procs", "2", "parallel.pp=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["layout"]["pp"] == 2 and found["auto"] and "auto: the plain model fits" in done.stderr
    assert found["answers"][0]["tokens"] == goes_on(pool, folder, "ab")

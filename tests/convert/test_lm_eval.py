"""lm-evaluation-harness scores an exported folder as the toolkit scores the checkpoint;
`make test-lm-eval` installs and runs it.

Nothing is fetched: the tasks are local files. Each kind of request that the harness makes has its task.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.convert.tokenized import CONTEXT, END, TEXT, made
from tests.pool import Pool

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: make test-lm-eval", allow_module_level=True)

NEW = 12
QUESTIONS = [
    {"question": "The quick brown", "choices": ["fox", "dog sleeps", "lazy"], "answer": 0},
    {"question": "Packs of lazy", "choices": ["dogs", "foxes sleep", "the"], "answer": 1},
    {"question": "over the", "choices": ["quick", "brown", "lazy dog."], "answer": 2},
]
WINDOWS = 4


def long_text(ours: Path) -> str:
    """A text whose tokens, with the end of the document, fill the context several times.

    The harness gives a last, shorter window more tokens before it, and `toolkit evaluate` does not.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ours / "tokenizer.json"))
    ids = tokenizer.encode(" ".join([TEXT] * 20)).ids[: WINDOWS * CONTEXT - 1]
    text = str(tokenizer.decode(ids))
    assert tokenizer.encode(text).ids == ids
    return text


def run_harness(model: Path, out: Path) -> dict[str, Any]:
    """{task: (results, samples)} of the harness's own command on an exported folder."""
    long = long_text(model) + END
    tasks: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "own_choices": (
            QUESTIONS,
            {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer"},
        ),
        "own_text": ([{"text": long}], {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}),
        "own_answers": (
            QUESTIONS,
            {
                "output_type": "generate_until",
                "doc_to_text": "{{question}}",
                "doc_to_target": "x",
                "generation_kwargs": {"until": [END], "max_gen_toks": NEW, "do_sample": False},
            },
        ),
    }
    metrics = {"own_choices": "acc", "own_text": "bits_per_byte", "own_answers": "exact_match"}
    out.mkdir()
    for name, (rows, task) in tasks.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        described = {"task": name, "dataset_path": "json", "test_split": "test", "metric_list": [{"metric": metrics[name]}]}
        described["dataset_kwargs"] = {"data_files": {"test": str(out / f"{name}.jsonl")}}
        (out / f"{name}.yaml").write_text(yaml.safe_dump(described | task))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", *tasks, "--include_path", str(out), "--device", "cpu", "--output_path", str(out / "found"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "home"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
    (results,) = (out / "found").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    samples = {}
    for name in tasks:
        (lines,) = (out / "found").rglob(f"samples_{name}_*.jsonl")
        samples[name] = sorted(map(json.loads, lines.read_text().splitlines()), key=lambda s: s["doc_id"])
    return {name: (found[name], samples[name]) for name in tasks}


@pytest.fixture(scope="module", params=["llama", "gpt"])
def scored(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, and what the harness says of its exported folder."""
    from toolkit.convert.exporting import export_model

    folder = tmp_path_factory.mktemp(request.param)
    ours = made(request.param, folder)
    export_model(ours, folder / "exported")
    return ours, run_harness(folder / "exported", folder / "harness")


def test_choices_are_as_probable_as_here(pool: Pool, scored: tuple[Path, dict[str, Any]]) -> None:
    ours, found = scored
    results, samples = found["own_choices"]
    asked = [(q["question"], [f" {c}" for c in q["choices"]]) for q in QUESTIONS]
    expected = pool.run("tests.inference.run:choices", 1, {"model": str(ours), "asked": asked}, deadline_s=180)[0]
    right = 0
    for sample, scores, question in zip(samples, expected, QUESTIONS, strict=True):
        theirs = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert theirs == pytest.approx(scores, rel=1e-4)
        right += scores.index(max(scores)) == question["answer"]
    assert results["acc,none"] == pytest.approx(right / len(QUESTIONS))


def test_text_is_as_probable_as_to_evaluate(pool: Pool, scored: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Windows of the context's length that do not overlap, after one end of a document:
    `toolkit evaluate`'s own.
    """
    from toolkit.data.prepare import prepare
    from toolkit.evaluate.resolve import Task, resolve_evaluation

    ours, found = scored
    _, samples = found["own_text"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("x", long_text(ours))))
    prepare(str(tmp_path / "text.jsonl"), tokenizer=str(ours / "tokenizer.json"), out=tmp_path / "text", workers=1, progress=False)
    keys = [f"train.seq_length={CONTEXT}", "train.global_batch_size=1", "train.micro_batch_size=1", "data.workers=0"]
    asked = resolve_evaluation(ours, str(tmp_path / "text"), keys, num_procs=1, batches=None, split="all")
    span = dataclasses.replace(asked.task.span, first=1)  # "x" is one token; its end comes before the text, as the harness has it
    assert span.labels == WINDOWS * CONTEXT
    asked = dataclasses.replace(asked, task=Task(span, WINDOWS))
    (tmp_path / "run").mkdir()
    asked.write(tmp_path / "run")
    here = pool.run("toolkit.evaluate.__main__:measure", 1, tmp_path / "run", deadline_s=180)[0]
    assert here["tokens"] == span.labels
    assert float(samples[0]["filtered_resps"][0]) == pytest.approx(-here["loss"] * here["tokens"], rel=1e-5)


def test_answers_are_those_of_generate(pool: Pool, scored: tuple[Path, dict[str, Any]]) -> None:
    from toolkit.inference.source import open_model
    from toolkit.inference.text import Text

    ours, found = scored
    text = Text(open_model(ours))
    ids = [text.encode(q["question"], name="a prompt") for q in QUESTIONS]
    asked = {"model": str(ours), "tokenizer": None, "max_new_tokens": NEW, "ids": ids}
    answers = pool.run("tests.inference.run:tokens", 1, asked, deadline_s=180)[0]
    theirs = [sample["filtered_resps"][0] for sample in found["own_answers"][1]]
    assert theirs == [text.decode(tokens) for tokens, _ in answers]
    assert torch.tensor([len(t) for t in theirs]).min() > 0

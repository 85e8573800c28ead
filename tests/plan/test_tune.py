"""What tune says and writes: reasons, what-ifs, refusals that help, files that run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.plan.questions import SHAPE, question, smaller_memory
from toolkit.cli import app
from toolkit.config.load import dump_config, load_config
from toolkit.cost.memory import GIB
from toolkit.errors import ConfigError, LayoutError, ToolkitError
from toolkit.parallel import rules
from toolkit.plan.search import Limits
from toolkit.plan.space import AXES, parse_fixes
from toolkit.plan.tune import tune
from toolkit.plan.tune_show import tune_json, tune_text


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(question(batch=32).config))
    return path


def _run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["tune", *arguments])
    if isinstance(done.exception, ToolkitError):
        return done.exception.exit_code, f"{done.output}error: {done.exception}"
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.output


def test_text_says_which_why_and_what_if() -> None:
    answer = tune(question("h100-80gb:8x2", batch=32), top=6)
    text = tune_text(answer)
    for words in (
        "candidates",
        "tokens/s",
        "best: ",
        "of the step: ",
        "memory: ",
        "why the others lose",
        "what if",
        "twice the nodes",
        "8,192 tokens",
    ):
        assert words in text, words
    assert "−" not in "".join(line for line in text.splitlines() if "parallel" in line and "made up" not in line)


def test_reasons_name_the_part_that_is_longer() -> None:
    """Full recomputation against none of the same layout: what is more is the recomputation."""
    asked = question("h100-80gb:8", fixed={"tp": (2,), "recompute": ("none", "full"), "micro": (1,)})
    plans = tune(asked, top=2, what_if=False)
    answer = replace(
        plans,
        result=replace(
            plans.result, plans=[plans.best, *replace(asked, fixed={"tp": (2,), "recompute": ("full",), "micro": (1,)}).ask(top=1).plans]
        ),
    )
    assert "recomputation +" in tune_json(answer)["plans"][1]["why_not"]


def test_json_agrees_with_itself() -> None:
    answer = tune_json(tune(question("h100-80gb:8x2", batch=32), top=4))
    assert json.loads(json.dumps(answer)) == answer
    assert answer["best"] == {k: v for k, v in answer["plans"][0].items() if k != "why_not"}
    for plan in answer["plans"]:
        layout = plan["layout"]
        assert layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"] == plan["gpus"]
        assert set(plan["settings"]) == {key for key, _ in AXES.values() if key}
        assert sum(plan["time_parts_s"].values()) == pytest.approx(plan["step_s"])
    assert len(answer["what_if"]) == 4


def test_a_larger_gpu_never_makes_the_best_plan_slower() -> None:
    answer = tune(smaller_memory(question("h100-80gb:4", batch=32), 8), top=1)
    memory, links, nodes, _ = (item.plan for item in answer.what_if)
    assert memory and links and nodes
    assert all(plan.time.step <= answer.best.time.step * (1 + 1e-9) for plan in (memory, links, nodes))


@pytest.mark.parametrize(
    ("spec", "more", "error", "words"),
    [
        ("h100-80gb:8", {"fixed": {"tp": (3,)}}, LayoutError, "parallel.tp=3 does not divide"),
        ("h100-80gb:8", {"fixed": {"cp": (3,)}}, LayoutError, "parallel.cp=3"),
        (
            "h100-80gb:8",
            {"fixed": {"zero": (0,), "offload_optimizer": ("cpu",)}},
            LayoutError,
            "zero.offload_optimizer=cpu with zero.stage=0",
        ),
        ("h100-80gb:8", {"fixed": {"offload_optimizer": ("nvme",)}}, LayoutError, "nvme"),
        ("h100-80gb:8", {"fixed": {"dp": (5,)}}, LayoutError, "dp=5"),
        ("h100-80gb:8", {"fixed": {"tp": (4,), "dp": (4,)}}, ConfigError, "needs 16 GPUs, and h100-80gb:8x1 allows 8"),
        ("h100-80gb:8", {"fixed": {"tp": (4,)}, "max_gpus": 2}, ConfigError, "needs 4 GPUs, and --max-gpus 2 allows 2"),
        ("h100-80gb:8", {"max_gpus": 0}, ConfigError, "leaves no GPU"),
        ("h100-80gb:8", {"limits": Limits(max_cost=3.0)}, ConfigError, "--max-cost has no price"),
        ("h100-80gb:8", {"limits": Limits(price=-1.0)}, ConfigError, "is not above 0"),
        ("h100-80gb:8", {"limits": Limits(headroom=90 * GIB)}, ConfigError, "leaves nothing of the 79.1 GiB"),
        ("h100-80gb:8", {"limits": Limits(max_step_s=1e-6)}, LayoutError, "the fastest plan"),
        ("h100-80gb:8", {"limits": Limits(max_cost=1e-6, price=2.0, steps=1000)}, LayoutError, "the cheapest plan"),
        ("h100-80gb:8", {"seq": 16384}, LayoutError, "train.seq_length=16384 exceeds"),
    ],
)
def test_what_contradicts_itself_is_refused(spec: str, more: dict[str, Any], error: type[ToolkitError], words: str) -> None:
    with pytest.raises(error, match=words):
        tune(question(spec, **more))


def test_targets_that_only_together_cannot_be_met() -> None:
    asked = question("h100-80gb:8")
    fastest, cheapest = (replace(asked, objective=objective).ask(top=1).plans[0] for objective in ("tokens/s", "cost"))
    price = Limits(price=1.0, steps=1000)
    tight = replace(price, max_step_s=1.001 * fastest.time.step, max_cost=1.001 * price.cost(cheapest.time.step, cheapest.gpus))
    with pytest.raises(LayoutError, match="Each alone can be met, both together cannot"):
        tune(replace(asked, limits=tight))


def test_a_model_that_fits_nowhere_says_by_how_much_and_what_would_help() -> None:
    large = {"num_layers": 96, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8}
    asked = question("rtx4090-24gb:1", model=large, seq=2048)
    with pytest.raises(LayoutError) as refused:
        tune(asked)
    text = str(refused.value)
    assert "fit in no legal layout on 1 GPU of" in text and "GiB more than the 230.4 GiB that are free there" in text
    ram = float(re.search(r"([0-9.]+) GiB of RAM a node makes it fit", text)[1])  # type: ignore[index]
    assert tune(asked.with_host_gib(1.01 * ram), what_if=False).result.plans
    spec_named = text.split("It fits on ")[1].split(" ")[0]
    assert tune(question(spec_named, model=large, seq=2048), what_if=False).result.plans
    with pytest.raises(LayoutError, match=r"GiB more than the 64\.0 GiB there"):
        tune(question("cpu:1", model=large, seq=2048))
    fixed = replace(question("h100-80gb:1", model=large, seq=8192), fixed={"recompute": ("none",), "offload_optimizer": ("none",)})
    with pytest.raises(LayoutError, match="Fixing nothing makes it fit"):
        tune(fixed)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["parallel.tp"], "AXIS=VALUE"),
        (["parallel.tq=2"], "Did you mean parallel.tp"),
        (["tp=two"], "is no degree"),
        (["tp=0"], "is no degree"),
        (["zero.stage=4"], "Use one of 0, 1, 2, 3"),
        (["tp=1", "parallel.tp=2"], "gives tp twice"),
        (["train.steps=3"], "names nothing that tune chooses"),
    ],
)
def test_wrong_fixes_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_fixes(texts)


def test_fixes_are_read() -> None:
    assert parse_fixes(["parallel.tp=2,4", "sp=TRUE", "zero.offload_param=cpu"]) == {"tp": (2, 4), "sp": (True,), "offload_param": ("cpu",)}


def test_the_written_plan_is_a_run(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    code, text = _run(str(config), "parallel.tp=2", "--hardware", "h100:8x2", "--out", str(out), "--price", "2.5", "--no-what-if")
    assert code == 0, text
    assert "cost" in text and "what if" not in text and f"toolkit train {out}/run.yaml --hostfile" in text
    written = load_config(out / "run.yaml")
    ranking = json.loads((out / "tune.json").read_text())
    assert written.parallel.tp == 2 and {plan["layout"]["tp"] for plan in ranking["plans"]} == {2}
    layout = rules.check(written, ranking["best"]["gpus"], machine=rules.Machine(cuda=True))
    ds_config = json.loads((out / "ds_config.json").read_text())
    assert ds_config["train_batch_size"] == layout.dp * layout.micro_batch_size
    assert ds_config["zero_optimization"]["stage"] == written.zero.stage
    subprocess.run(["bash", "-n", str(out / "launch.sh")], check=True)
    assert (out / "launch.sh").stat().st_mode & 0o111
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hardware", "h1000:8"], "Did you mean"),
        (["--hardware", "h100:8", "--objective", "fast"], "--objective 'fast' is not known"),
        (["--hardware", "h100:8", "--top", "0"], "--top 0 is too few"),
        (["--hardware", "h100:8", "--host-gib", "0"], "--host-gib 0 is not above 0"),
        (["--hardware", "h100:8", "--calibration", "nothing.yaml"], "calibration file 'nothing.yaml' cannot be read"),
        (["--hardware", "h100:8", "--out", "/dev/null/x"], "cannot be written"),
        (["--hardware", "h100:8", "--trials", "1"], "needs 8 GPUs on this machine"),
        (["--hardware", "h100:8", "train.steps=x"], "train.steps"),
    ],
)
def test_wrong_commands_end_with_one_message(config: Path, arguments: list[str], words: str) -> None:
    code, text = _run(str(config), "--no-what-if", *arguments)
    assert code == 2 and words in text and "Traceback" not in text


@pytest.mark.parametrize("verb", ["tune", "estimate"])
def test_verbs_start_without_training_libraries(verb: str, config: Path) -> None:
    program = (
        "import sys, toolkit.cli\n"
        f"sys.argv = ['toolkit', {verb!r}, {str(config)!r}, '--hardware', 'h100:4x1', '--json']\n"
        "try:\n    toolkit.cli.main()\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "heavy = {'torch', 'deepspeed', 'megatron', 'transformers', 'datasets', 'numpy'} & {m.split('.')[0] for m in sys.modules}\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hardware"] == "h100-80gb:4x1"


def test_deepspeed_json_of_the_user_stays(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": "auto", "overlap_comm": true}, "memory_breakdown": true}')
    path = tmp_path / "run.yaml"
    model = ", ".join(f"{key}: {value}" for key, value in SHAPE.items())
    path.write_text(f"model: {{{model}}}\nzero: {{config: {tmp_path}/ds.json}}\ntrain: {{global_batch_size: 8, seq_length: 1024}}\n")
    code, text = _run(
        str(path), "--hardware", "h100:2", "--out", str(tmp_path / "plan"), "--no-what-if", "--fix", "zero.stage=2", "--fix", "dp=2"
    )
    assert code == 0, text
    ds_config = json.loads((tmp_path / "plan" / "ds_config.json").read_text())
    assert ds_config["memory_breakdown"] is True and ds_config["zero_optimization"]["overlap_comm"] is True

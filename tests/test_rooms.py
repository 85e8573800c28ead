"""Who may import what: pure rooms stay pure, and deepspeed has one door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

# from the ground up: a room imports only rooms before it
HOUSE = [
    *("errors", "redact", "files", "tensors", "arch", "config", "parallel", "hardware", "runfolder", "cluster"),
    *("data", "cost", "plan", "evidence", "doctor"),
    *("model", "engine", "checkpoint", "convert", "train", "evaluate", "inference", "profile", "rehearse", "report", "supervise"),
    *("trainer", "calibrate", "gpu_check", "cli"),
]
ROOT = Path(__file__).parents[1] / "toolkit"
HEAVY = ("torch", "deepspeed", "megatron", "transformers", "datasets")
PURE = [
    "toolkit",
    "toolkit.cli",
    "toolkit.trainer",
    "toolkit.config.load",
    "toolkit.config.deepspeed",
    "toolkit.parallel.rules",
    "toolkit.cluster.launch",
    "toolkit.cluster.locks",
    "toolkit.doctor.probe",
    "toolkit.doctor.session",
    "toolkit.cost.own_engine",
    "toolkit.plan.remedy",
    "toolkit.evaluate.resolve",
    "toolkit.profile.show",
    "toolkit.report.page",
    "toolkit.rehearse.session",
    "toolkit.rehearse.play",
    "toolkit.rehearse.show",
    "toolkit.supervise.run",
    "toolkit.calibrate.session",
    "toolkit.cost.cpu_step",
]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _rooms_imported(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, within functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {_room(a.name) for a in node.names if a.name.startswith("toolkit.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "toolkit":
            found |= {a.name for a in node.names if not a.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("toolkit."):
            found.add(_room(node.module))
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    # a room's __main__ is a program over the whole house, as the commands of cli.py are, and
    # nothing imports it
    room = "cli" if path.name == "__main__.py" else path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return  # the package's door: it names what it offers, and loads it when it is asked for
    assert room in HOUSE, f"{room} has no place in the house: add it to HOUSE where it stands"
    above = {other for other in _rooms_imported(path) - {room} if HOUSE.index(other) > HOUSE.index(room)}
    assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}, which stand above {room}"


def test_deepspeed_is_imported_in_one_file() -> None:
    users = {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if "deepspeed" in _imports(p)}
    assert users == {"engine/zero.py"}


# attributes of DeepSpeed's optimizers and of parameters that it partitions: they change with its
# versions, so two files know them
DEEPSPEED_FILES = {"engine/zero.py", "engine/deepspeed_state.py"}
PRIVATE = re.compile(
    r"""\b(
        bit16_groups | bit16_groups_flat | parallel_partitioned_bit16_groups | fp16_groups | fp16_partitioned_groups_flat
        | single_partition_of_fp32_groups | fp32_partitioned_groups_flat | params_in_partition | averaged_gradients | all_grad_tensors
        | grad_partitions_flat_buffer | accumulated_grads_in_cpu | norm_for_param_grads | ipg_buckets | dp_process_group
        | subgroup_to_device | sub_group_to_group_id | backup_optimizer | update_lp_params | checkpoint_event_(pro|epi)logue
        | _optimizer_states_and_gradient_swap_(in|out) | _swappable_optimizer_subgroup | _reassign_or_swap_out_partitioned_parameters
        | _backward_(pro|epi)logue | clear_backward_seen_flag | finalize_gradient_accumulation_boundary | _link_all_hp_params
        | ds_(tensor|shape|numel|id|persist|secondary_tensor|opt_adam) | partition_numel | param_id_to_grad_partition
    )\b""",
    re.VERBOSE,
)


def test_deepspeeds_private_attributes_are_named_in_two_files() -> None:
    users = {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if PRIVATE.search(p.read_text())}
    assert users == DEEPSPEED_FILES


def test_megatron_is_imported_where_it_belongs() -> None:
    rooms = {p.relative_to(ROOT).parts[0] for p in ROOT.rglob("*.py") if "megatron" in _imports(p)}
    # rehearse goes through them, and calibrate times their functions
    assert rooms <= {"model", "parallel", "engine", "data", "train", "calibrate"}


def test_no_production_code_knows_the_stand_ins() -> None:
    """They replace torch.cuda for a whole process, so only the interpreter of a rehearsal may load them."""
    users = {
        str(p.relative_to(ROOT))
        for p in ROOT.rglob("*.py")
        if "rehearse.device" in p.read_text() or "rehearse import device" in p.read_text()
    }
    assert users == {"rehearse/__main__.py", "rehearse/rank.py", "rehearse/record.py"}
    assert {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if "import disk" in p.read_text()} == {"rehearse/rank.py"}


@pytest.mark.parametrize("module", PURE)
def test_pure_rooms_load_without_torch(module: str) -> None:
    code = f"import sys, {module}\nprint(sorted({HEAVY!r} & sys.modules.keys()))".replace(repr(HEAVY), repr(set(HEAVY)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

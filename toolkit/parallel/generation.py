"""Which savings of a generation go together: its own table of rules, beside the one that a training run is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from toolkit.arch.spec import ModelSpec
from toolkit.parallel.options import choices
from toolkit.parallel.table import Rule

INT4_GROUPS = (64, 32)  # columns that share a scale and a zero in int4: the larger where all widths are multiples of it
BITS = ("none", "int8", "int4")
KV = ("none", "int8", "cpu")
PLACES = ("none", "cpu", "disk", "zero", "zero-cpu", "zero-nvme")


@dataclass(frozen=True, kw_only=True)
class GenerationCase:
    """One way to generate with a model. weights, kv, prune, offload: as the options of toolkit generate, "none" for none.

    columns: of a rank's part of each linear layer's weight. by_part: whether single weights can be read from the model's file.
    copies: of the model, with prompts of their own. cuda: whether ranks have GPUs.
    """

    tp: int = 1
    pp: int = 1
    copies: int = 1
    weights: str = "none"
    kv: str = "none"
    grow: bool = False
    prune: str = "none"
    offload: str = "none"
    columns: tuple[int, ...] = ()
    positions: int = 0
    context: int = 0  # tokens of prompt and answer; 0: not known yet
    by_part: bool = True
    cuda: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, *, tp: int = 1, **given: Any) -> GenerationCase:
        """The case of a model that so many tensor-parallel ranks share."""
        return cls(tp=tp, columns=linear_columns(spec, tp=tp), **given)

    def changed(self, settings: Mapping[str, Any]) -> GenerationCase:
        """A copy with options (--name: value) set."""
        return replace(self, **{option.removeprefix("--"): value for option, value in settings.items()})


def linear_columns(spec: ModelSpec, *, tp: int) -> tuple[int, ...]:
    """Columns of each linear layer's weight on a rank, ascending."""
    return tuple(sorted({w.cut.part(w.shape, tp)[1] for w in spec.layer if w.group == "matrix"}))


def int4_group(columns: tuple[int, ...]) -> int | None:
    """The widest group of columns that int4 can be kept in; None where there is none for all weights."""
    return next((g for g in INT4_GROUPS if all(c % g == 0 for c in columns)), None)


GENERATION_RULES: tuple[Rule[GenerationCase], ...] = (
    Rule(
        id="int4-columns",
        title=f"`--weights int4` needs weights of a multiple of {INT4_GROUPS[-1]} columns on each rank",
        why=f"groups of {INT4_GROUPS[-1]} columns share a scale",
        broken=lambda c: c.weights == "int4" and int4_group(c.columns) is None,
        what=lambda c: f"--weights int4 with a weight of {next(n for n in c.columns if n % INT4_GROUPS[-1])} columns on a rank",
        options=lambda c: choices({"--weights": "int8"}),
        hint="set a lower parallel.tp",
    ),
    Rule(
        id="prune-fours",
        title="`--prune 2:4` needs weights of a multiple of 4 columns on each rank",
        why="rows are cut into fours",
        broken=lambda c: c.prune == "2:4" and any(n % 4 for n in c.columns),
        what=lambda c: f"--prune 2:4 with a weight of {next(n for n in c.columns if n % 4)} columns on a rank",
        options=lambda c: choices({"--prune": "0.5"}),
    ),
    Rule(
        id="offload-cpu",
        title="`--offload cpu` needs a GPU",
        why="without one the weights are in the CPU's memory anyway",
        broken=lambda c: c.offload == "cpu" and not c.cuda,
        what=lambda c: "--offload cpu on a machine without a GPU",
        options=lambda c: choices({"--offload": "disk"}, {"--offload": "none"}),
    ),
    Rule(
        id="offload-weights",
        title="`--offload` needs `--weights none`",
        why="layers come as they are stored, and to quantise each one anew for every token takes longer than to read it",
        broken=lambda c: c.offload != "none" and c.weights != "none",
        what=lambda c: f"--offload {c.offload} beside --weights {c.weights}",
        options=lambda c: choices({"--offload": "none"}, {"--weights": "none"}),
    ),
    Rule(
        id="offload-prune",
        title="`--offload` needs `--prune none`",
        why="layers come as they are stored, and each one would be pruned anew for every token",
        broken=lambda c: c.offload != "none" and c.prune != "none",
        what=lambda c: f"--offload {c.offload} beside --prune {c.prune}",
        options=lambda c: choices({"--prune": "none"}, {"--offload": "none"}),
    ),
    Rule(
        id="offload-by-part",
        title="`--offload disk` needs a file of which single weights can be read",
        why="GGUF files are read as a whole",
        broken=lambda c: c.offload == "disk" and not c.by_part,
        what=lambda c: "--offload disk with a GGUF file",
        options=lambda c: choices({"--offload": "none"}),
        hint="import the model first (toolkit convert import)",
    ),
    Rule(
        id="offload-zero",
        title="`--offload zero` needs two copies of the model, or more",
        why="the copies share out the layers, and one alone keeps them all",
        broken=lambda c: c.offload == "zero" and c.copies == 1,
        what=lambda c: "--offload zero with one copy of the model",
        options=lambda c: choices({"--offload": "zero-cpu"} if c.cuda else {"--offload": "disk"}, {"--offload": "none"}),
        hint="set a higher --num-procs",
    ),
    Rule(
        id="kv-cpu",
        title="`--kv cpu` needs a GPU",
        why="without one keys and values are in the CPU's memory anyway",
        broken=lambda c: c.kv == "cpu" and not c.cuda,
        what=lambda c: "--kv cpu on a machine without a GPU",
        options=lambda c: choices({"--kv": "int8"}, {"--kv": "none"}),
    ),
    Rule(
        id="kv-cpu-grow",
        title="`--kv cpu` needs `--kv-grow` off",
        why="what is kept on the CPU takes no memory of the device that could grow",
        broken=lambda c: c.kv == "cpu" and c.grow,
        what=lambda c: "--kv cpu beside --kv-grow",
        options=lambda c: choices({"--kv": "none"}),
        hint="leave --kv-grow out",
    ),
    Rule(
        id="context",
        title="prompt and answer fit into `model.max_position_embeddings`",
        why="the model knows no positions beyond",
        broken=lambda c: 0 < c.positions < c.context,
        what=lambda c: f"--context {c.context} exceeds model.max_position_embeddings={c.positions}",
        options=lambda c: choices({"--context": c.positions}),
    ),
)

"""Which savings of a generation go together: its own table of rules, beside the one that a training
run is checked against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from toolkit.arch.spec import ModelSpec
from toolkit.errors import ConfigError
from toolkit.parallel.options import choices
from toolkit.parallel.rule import Rule

INT4_GROUPS = (64, 32)  # columns that share a scale and a zero in int4: the larger where all widths are multiples of it
BITS = ("none", "int8", "int4")
KV = ("none", "int8", "cpu")
CUTS = ("even", "measured")
PLACES = ("none", "cpu", "disk", "zero", "zero-cpu", "zero-nvme")


@dataclass(frozen=True, kw_only=True)
class GenerationCase:
    """One way to generate with a model. weights, kv, prune, offload: as the options of toolkit
    generate, "none" for none.

    columns: of a rank's part of each linear layer's weight. by_part: whether single weights can be
    read from the model's file.
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
    layers: int = 0  # of the whole model; 0: nobody asked how they are cut
    layers_per_stage: tuple[int, ...] = ()  # (): evenly, or as measured
    measured: bool = False
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
        values = {option.removeprefix("--").replace("-", "_"): value for option, value in settings.items()}
        if "layers_per_stage" in values:
            word = values["layers_per_stage"]
            values |= {"layers_per_stage": counts_of(word), "measured": word == "measured"}
        return replace(self, **values)


def counts_of(layers_per_stage: str) -> tuple[int, ...]:
    """Layers of each stage as --layers-per-stage has them, () where it names no numbers;
    ConfigError for what is none of its words.
    """
    if layers_per_stage in CUTS:
        return ()
    numbers = [part.strip() for part in layers_per_stage.split(",")]
    if not all(n.isdecimal() and n.isascii() and len(n) < 10 for n in numbers):
        raise ConfigError(
            f"--layers-per-stage {layers_per_stage}",
            why="it is neither a word nor numbers with commas between them",
            fix=f"Set it to {', '.join(CUTS)}, or to the layers of each stage, for example 10,6.",
        )
    return tuple(map(int, numbers))


def linear_columns(spec: ModelSpec, *, tp: int) -> tuple[int, ...]:
    """Columns of each linear layer's weight on a rank, ascending."""
    return tuple(sorted({w.cut.part(w.shape, tp)[1] for w in spec.layer if w.group == "matrix"}))


def int4_group(columns: tuple[int, ...]) -> int | None:
    """The widest group of columns that int4 can be kept in; None where there is none for all weights."""
    return next((g for g in INT4_GROUPS if all(c % g == 0 for c in columns)), None)


def _numbers(counts: Iterable[int]) -> str:
    return ",".join(map(str, counts))


def _asked(c: GenerationCase) -> str:
    return f"--layers-per-stage {_numbers(c.layers_per_stage)}"


def _counts_near(c: GenerationCase) -> Iterator[dict[str, Any]]:
    """The same shares of as many layers as there are."""
    wanted = [max(1, n) for n in c.layers_per_stage]
    if len(wanted) <= c.layers:
        while (over := sum(wanted) - c.layers) != 0:
            most = wanted.index(max(wanted))
            wanted[most] -= min(over, max(1, wanted[most] // 2)) if over > 0 else over
        yield {"--layers-per-stage": _numbers(wanted)}


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
        id="stage-count",
        title="`--layers-per-stage` has as many numbers as `parallel.pp`",
        why="each pipeline stage has its own",
        broken=lambda c: bool(c.layers_per_stage) and len(c.layers_per_stage) != c.pp,
        what=lambda c: f"{_asked(c)} has {len(c.layers_per_stage)} stages, and parallel.pp={c.pp}",
        options=lambda c: choices({"--layers-per-stage": "even"}),
        hint="leave parallel.pp out",
    ),
    Rule(
        id="stage-layers",
        title="the numbers of `--layers-per-stage` are 1 or more, and together `model.num_layers`",
        why="each layer is on one stage, and each stage has a layer",
        broken=lambda c: (
            bool(c.layers_per_stage) and c.pp <= c.layers and (min(c.layers_per_stage) < 1 or sum(c.layers_per_stage) != c.layers)
        ),
        what=lambda c: (
            f"{_asked(c)}: {sum(c.layers_per_stage)} layers, and model.num_layers={c.layers}"
            if min(c.layers_per_stage) > 0
            else f"{_asked(c)} leaves a stage without a layer"
        ),
        options=lambda c: choices(*_counts_near(c)),
    ),
    Rule(
        id="stage-each",
        title="with `--layers-per-stage`, `parallel.pp` is at most `model.num_layers`",
        why="each stage has a layer",
        broken=lambda c: 0 < c.layers < c.pp,
        what=lambda c: f"parallel.pp={c.pp} with model.num_layers={c.layers}",
        options=lambda c: choices(),
        hint="set parallel.pp to the number of layers, or lower",
    ),
    Rule(
        id="measured-stages",
        title="`--layers-per-stage measured` and `--rebalance` need `parallel.pp` > 1",
        why="one stage holds all layers",
        broken=lambda c: c.measured and c.pp == 1,
        what=lambda c: "layers cut as measured with parallel.pp=1",
        options=lambda c: choices({"--layers-per-stage": "even"}),
        hint="set parallel.pp, or leave --rebalance out",
    ),
    Rule(
        id="measured-offload",
        title="`--layers-per-stage measured` and `--rebalance` need `--offload none`",
        why="layers that are streamed take as long as the disk or the bus, and little memory wherever they are",
        broken=lambda c: c.measured and c.offload != "none",
        what=lambda c: f"layers cut as measured beside --offload {c.offload}",
        options=lambda c: choices({"--offload": "none"}, {"--layers-per-stage": "even"}),
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

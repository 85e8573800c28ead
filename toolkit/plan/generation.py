"""How to cut a model that is to generate: the plainest way that fits the devices that are there, and why; as text and as JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.arch.spec import ModelSpec
from toolkit.cost.generation import Generation, GenerationMemory, TokenTime, generation_memory, token_time
from toolkit.cost.memory import GIB
from toolkit.errors import ConfigError
from toolkit.hardware.catalogue import Hardware
from toolkit.parallel.options import chunk_counts, divisors
from toolkit.parallel.rules import GenerationCase, generation_violations, refuse
from toolkit.plan.show import count

# from the plainest on: what changes no answer, then what changes few, then what changes more, then what takes more time
LEVELS = (("none", "none"), ("int8", "none"), ("none", "cpu"), ("int4", "none"), ("none", "disk"))
WORDS = {"weights": "--weights", "kv": "--kv", "offload": "--offload", "tp": "parallel.tp", "pp": "parallel.pp"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way to generate, what it takes, and why it was taken: one sentence each."""

    way: Generation
    memory: GenerationMemory
    time: TokenTime
    reasons: list[str] = field(default_factory=list)

    @property
    def overrides(self) -> list[str]:
        return [f"parallel.tp={self.way.tp}", f"parallel.pp={self.way.pp}"]


def tensor_degrees_of(spec: ModelSpec) -> tuple[int, ...]:
    """Every tensor-parallel degree that a model can be cut by, ascending."""
    return divisors(math.gcd(spec.heads, spec.groups, spec.ffn, spec.rows))


def choose(
    wish: Generation,
    hardware: Hardware,
    *,
    prompts: int = 1,
    fixed: Sequence[str] = (),
    quantiser: bool = True,
    by_part: bool = True,
    spread: bool = False,
) -> Choice:
    """The plainest way of LEVELS of which some cut fits, in its fastest cut on up to hardware.count ranks; ConfigError where none fits.

    wish: model, precision, batch and context; its values named in `fixed` (tp, pp, weights, kv, offload) are kept. prompts: there are,
    which further copies of the model share out. quantiser: whether torchao is there; by_part: as GenerationCase's. spread: of the cuts
    that fit, take one over most ranks.
    """
    reasons: list[str] = []
    for weights, offload in LEVELS:
        if ("weights" in fixed and weights != wish.weights) or ("offload" in fixed and offload != wish.offload):
            continue
        name = _level(weights, offload)
        if weights != "none" and not quantiser:
            reasons.append(f"{name}: torchao is not installed")
            continue
        ways = list(_ways(replace(wish, weights=weights, offload=offload), hardware, fixed=fixed, prompts=prompts, by_part=by_part))
        if not ways:
            continue
        sized = [(generation_memory(w, hardware), w) for w in ways]
        fitting = [(token_time(w, hardware), m, w) for m, w in sized if m.fits]
        if not fitting:
            least, way = min(sized, key=lambda pair: pair[0].worst.total)
            reasons.append(
                f"{name} does not fit: at best (tp {way.tp} x pp {way.pp}) a rank needs {_gib(least.worst.total)} of {_gib(least.capacity)}"
            )
            continue
        fitting.sort(key=lambda f: (-f[2].tp * f[2].pp if spread else 0, -f[0].tokens_per_s, f[2].world))
        time, memory, way = fitting[0]
        reasons.append(f"{name} fits: a rank needs {_gib(memory.worst.total)} of {_gib(memory.capacity)}")
        others = [f for f in fitting[1:] if (f[2].tp, f[2].pp) != (way.tp, way.pp)]
        cut = f"tp {way.tp} x pp {way.pp}"
        if others:
            slower, _, other = others[0]
            what = f"{cut} uses {way.tp * way.pp} of {hardware.count} devices" if spread else f"{cut} gives most tokens a second"
            reasons.append(
                f"{what} (estimated: {time.tokens_per_s:.3g} a second); next is tp {other.tp} x pp {other.pp} ({slower.tokens_per_s:.3g})"
            )
        elif len(ways) > 1:
            reasons.append(f"{cut} is the only cut that fits")
        return Choice(way=way, memory=memory, time=time, reasons=reasons)
    raise ConfigError(
        f"the model fits in no way on {hardware.count} x {_gib(generation_memory(wish, hardware).capacity)}",
        why="; ".join(reasons) or "the options that are set leave no way",
        fix="Start more processes, or set a shorter --max-new-tokens, a smaller --batch-size or --kv int8.",
    )


def _level(weights: str, offload: str) -> str:
    if weights != "none":
        return f"{weights} weights"
    return {"none": "the plain model", "cpu": "layers from the CPU's memory", "disk": "layers from disk"}[offload]


def _ways(wish: Generation, hardware: Hardware, *, fixed: Sequence[str], prompts: int, by_part: bool) -> Iterator[Generation]:
    """Every legal cut of the model over up to hardware.count ranks."""
    spec = wish.model
    for tp in [wish.tp] if "tp" in fixed else tensor_degrees_of(spec):
        for pp in [wish.pp] if "pp" in fixed else chunk_counts(spec.layers):
            if tp * pp > hardware.count:
                continue
            way = replace(wish, tp=tp, pp=pp, dp=max(1, min(hardware.count // (tp * pp), prompts)))
            way = replace(way, batch=max(1, min(wish.batch, -(-prompts // way.dp))))
            if not generation_violations(case_of(way, cuda=hardware.gpu.accelerator, by_part=by_part)):
                yield way


def case_of(way: Generation, *, cuda: bool, by_part: bool = True, **more: Any) -> GenerationCase:
    """What the rules look at."""
    return GenerationCase.of(
        way.model, tp=way.tp, pp=way.pp, weights=way.weights, kv=way.kv, offload=way.offload, cuda=cuda, by_part=by_part, **more
    )


def check_way(way: Generation, hardware: Hardware, *, positions: int) -> None:
    """Refuse what toolkit generate refuses; LayoutError names every broken rule."""
    refuse(generation_violations(case_of(way, cuda=hardware.gpu.accelerator, positions=positions, context=way.context)))


# -- shown ----------------------------------------------------------------------------------------------


def generation_json(way: Generation, hardware: Hardware) -> dict[str, Any]:
    """Bytes of every stage's rank by part, and seconds a token by part."""
    memory, time = generation_memory(way, hardware), token_time(way, hardware)
    return {
        "hardware": str(hardware),
        "parameters": way.model.parameters,
        "layout": {"processes": way.world, "tp": way.tp, "pp": way.pp, "dp": way.dp},
        "precision": way.precision,
        "savings": {"weights": way.weights, "kv": way.kv, "offload": way.offload},
        "batch": way.batch,
        "context": way.context,
        "fits": memory.fits,
        "capacity": round(memory.capacity),
        "host": round(memory.host),
        "host_room": round(memory.room),
        "stages": [
            {
                "stage": s.stage,
                "layers": s.layers,
                "model": round(s.model),
                "weights": round(s.weights),
                "kv_cache": round(s.cache),
                "buffers": round(s.buffers),
                "process": round(s.process),
                "total": round(s.total),
            }
            for s in memory.stages
        ],
        "first_token_s": time.first,
        "token_s": time.token,
        "token_parts_s": time.parts,
        "tokens_per_s": time.tokens_per_s,
        "by_batch_and_context": [
            {
                "batch": w.batch,
                "context": w.context,
                "kv_cache": round(max(s.cache for s in m.stages)),
                "total": round(m.worst.total),
                "fits": m.fits,
                "token_s": token_time(w, hardware).token,
            }
            for w, m in _grid(way, hardware)
        ],
    }


def generation_text(way: Generation, hardware: Hardware, *, width: int = 100) -> str:
    """The same as tables and a verdict, for a terminal."""
    from rich.console import Console
    from rich.table import Table

    memory, time = generation_memory(way, hardware), token_time(way, hardware)
    out = Console(file=io.StringIO(), width=width, force_terminal=False)
    savings = [f"{name} {value}" for name in ("weights", "kv", "offload") if (value := getattr(way, name)) != "none"]
    out.print(
        f"{count(way.model.parameters)} parameters on {hardware}: tp {way.tp} · pp {way.pp} · dp {way.dp} · {way.precision}"
        + "".join(f" · {s}" for s in savings)
        + f" · {way.batch} texts of {way.context:,} tokens",
        highlight=False,
    )
    table = Table(title="memory of one rank, GiB", title_justify="left")
    for name in ("stage", "layers", "weights", "KV cache", "buffers", "process", "total"):
        table.add_column(name, justify="right")
    for s in memory.stages:
        table.add_row(str(s.stage), str(s.layers), *(f"{v / GIB:.2f}" for v in (s.weights, s.cache, s.buffers, s.process, s.total)))
    out.print(table)
    verdict = "fits" if memory.fits else "does not fit"
    out.print(f"{verdict}: {_gib(memory.worst.total)} of {_gib(memory.capacity)} a rank", highlight=False)
    if memory.host:
        out.print(f"in the CPU's memory of a node: {_gib(memory.host)} of {_gib(memory.room)}", highlight=False)
    if not memory.fits:
        out.print(_remedy(way, hardware), highlight=False)
    parts = " · ".join(f"{name} {_ms(value)}" for name, value in time.parts.items() if value > 0)
    out.print(f"a token, context full: {_ms(time.token)} ({parts})", highlight=False)
    out.print(f"{time.tokens_per_s:,.3g} tokens/s of all texts · first token after {_ms(time.first)}", highlight=False)
    grid = list(_grid(way, hardware))
    contexts = sorted({w.context for w, _ in grid})
    table = Table(title="KV cache and all of a rank, GiB, and a token's time, by batch and context", title_justify="left")
    table.add_column("batch", justify="right")
    for context in contexts:
        table.add_column(f"{context:,}", justify="right")
    for batch in sorted({w.batch for w, _ in grid}):
        cells = [(w, m) for w, m in grid if w.batch == batch]
        table.add_row(
            str(batch),
            *(
                f"{max(s.cache for s in m.stages) / GIB:.2f} / {m.worst.total / GIB:.2f}{'' if m.fits else ' (full)'}, "
                + _ms(token_time(w, hardware).token)
                for w, m in cells
            ),
        )
    out.print(table)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _grid(way: Generation, hardware: Hardware) -> Iterator[tuple[Generation, GenerationMemory]]:
    """The way asked for beside other batches and shorter contexts."""
    for batch in sorted({1, 8, 32, way.batch}):
        for context in sorted({c for c in (way.context // 4, way.context // 2, way.context) if c}):
            other = replace(way, batch=batch, context=context, prompt=min(way.prompt, context))
            yield other, generation_memory(other, hardware)


def _remedy(way: Generation, hardware: Hardware) -> str:
    """The first single change that fits, of those that change the answers least."""
    spec = way.model
    options: list[dict[str, Any]] = [{"tp": n} for n in tensor_degrees_of(spec) if n > way.tp and n * way.pp <= hardware.count]
    options += [{"pp": n} for n in chunk_counts(spec.layers) if n > way.pp and n * way.tp <= hardware.count]
    options += [{"kv": "int8"}, {"weights": "int8"}, {"offload": "cpu"}, {"weights": "int4"}, {"offload": "disk"}]
    for option in options:
        changed = replace(way, **option)
        if changed == way or generation_violations(case_of(changed, cuda=hardware.gpu.accelerator)):
            continue
        memory = generation_memory(changed, hardware)
        if memory.fits:
            (name, value), sign = *option.items(), "=" if set(option) & {"tp", "pp"} else " "
            return f"Set {WORDS[name]}{sign}{value}: a rank then needs {_gib(memory.worst.total)}."
    return "No single change fits: use more devices, a smaller batch or a shorter context."


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

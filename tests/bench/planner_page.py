"""docs/planner.md as text: scores, pictures, constants with their sources and sensitivities, and what is missing."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from toolkit.cost import constants, spread
from toolkit.evidence import measures
from toolkit.evidence.evaluate import Evaluation
from toolkit.evidence.published import predict, read_row

# target, by figure: (path in the scores, text, least, most)
TARGETS: tuple[tuple[tuple[str, ...], str, float | None, float | None], ...] = (
    (("coverage",), "coverage", 0.97, None),
    (("throughput", "mdape_median_over_sources"), "throughput MdAPE, median over sources", None, 0.06),
    (("throughput", "p90_rows"), "throughput error, 90th percentile of rows", None, 0.20),
    (("memory", "mdape_median_over_sources"), "memory MdAPE, median over sources", None, 0.06),
    (("memory", "p90_rows"), "memory error, 90th percentile of rows", None, 0.20),
    (("fits", "balanced_accuracy"), "fits, balanced accuracy", 0.95, None),
    (("ranking", "median_spearman"), "ranking, median Spearman ρ", 0.85, None),
    (("ranking", "mean_top1_regret"), "ranking, mean top-1 regret", None, 0.04),
    (("intervals", "throughput", "coverage_mean_over_sources"), "throughput intervals, share of truths inside", 0.75, 0.88),
    (("intervals", "throughput", "median_relative_width"), "throughput intervals, median relative width", None, 0.35),
    (("intervals", "memory", "coverage_mean_over_sources"), "memory intervals, share of truths inside", 0.75, 0.88),
    (("intervals", "memory", "median_relative_width"), "memory intervals, median relative width", None, 0.30),
    (("sureness", "of_them_ran"), "of runs said to fit with p ≥ 0.9, share that ran", 0.97, None),
)

# what a source shows that no formula here has
MISSING = {
    "gist-ds-offload": "one person's table. Offloaded steps take 17-20 s longer, ten times what DeepSpeed's CPU Adam needs with all cores "
    "(a launcher that leaves each rank one thread would do that); the parameter-offload rows report less memory than their logits "
    "alone take, and the 8/128 row the memory of twice its micro-batch: the printed micro-batches are doubtful.",
    "bigscience22": "five of the nine groups whose ranking is judged are of this source, which is why ρ is not reached. Their page says "
    "that the nodes' PCI-Express and NUMA settings were improved on 25 February 2022, that numbers from before and after must not be "
    "compared, and that each is one snapshot of the second iteration. The groups compare them: equal layouts ran 4-8 % faster from that "
    "day on, and estimates lie 2 % above the older rows and 5 % below the newer ones (medians). Single rows stand out: TP 4 with "
    "micro-batches of 1 takes 1.43 times as long as with 2 (row 099), and the two rows with 128-wide heads (066, 072) are 13 and 15 % "
    "slower than neighbours with wider and with narrower ones. What still follows a rule: at TP 8, micro-batches of 1 and 2 are 5-10 % "
    "slower than estimated, beside larger ones.",
    "mtnlg22": "three rows of one model. Between them 0.196 s a micro-batch, as estimated (0.192), but 13 s a step beside it where 7 are "
    "estimated. Nothing published says what the other 6 s are, so no formula has them.",
    "nanotron25": "at 64 nodes runs with few tokens a GPU lose half their time to something that neither latencies nor kernel launches "
    "explain; 80B on 4 nodes is 2.5 times slower than its neighbours. Small models on few nodes are 10-25 % faster than estimated. "
    "Which counter its memory is of is not stated.",
    "hagemann23": "micro-batches of 4 at PP 2 are 5-8 % slower than estimated, which ranks them too high; out-of-memory verdicts of "
    "recomputed runs at 55-78 GiB of 79 are not met: something of that engine holds 5-20 GiB more at data-parallel degrees of 32 to 128.",
    "internevo-mem": "memory kind and sequence length are not stated. Rows of its own ZeRO-1 optimizer lie 12-17 % above the estimate.",
    "mcore-ci": "deterministic mode on GB200: which attention kernel runs there is not published. Its memory is that of the last rank, "
    "which a row does not say outside of what was measured; the estimate is of the worst one.",
    "mosaic-mpt": "runs at the edge of device memory lose 15-25 % to allocator retries.",
    "stas-offload": "ZeRO-3's floor at short sequences: 12.6 GiB reserved, of which the buffers here explain about 10.",
    "simumax-b200": "the other two sources of a B200 disagree by 20 %; without this one its scalar is taken from them. TP 8 of a 8192-wide "
    "model is 8-17 % slower than estimated.",
}

_METHOD = """\
## How an estimate is made

- **Memory** (`toolkit/cost/memory.py`): parameters, gradients and optimizer states by ZeRO stage and software; activations term by
term (arXiv 2205.05198) times the micro-batches in flight (1F1B or interleaved); logits; ZeRO buckets and gathered layers. The worst
of backward, loss and optimizer step counts. The allocator's spare blocks, flat buffers that find no room in freed blocks, and the
driver's and NCCL's own are added.
- **Time** (`toolkit/cost/step.py`): each weight multiply by its tiles, waves and stores; attention from kernel benchmarks by sequence
length and head width; memory-bound passes by bytes; the host's launches where the GPU is faster; collectives by bandwidth and NCCL's
step latencies over fabric and network; what the software overlaps; the pipeline's slowest stage, fill and drain; recompute;
optimizer; offload; the slowest of many nodes.
- **Software** (`toolkit/cost/stack.py`): switches such as *norms fused*, *gradients in fp32*, *logits gathered*. For a published row
`toolkit/evidence/software.py` sets them from its words, and else from what was usual in its year.
- **Intervals** (`toolkit/cost/spread.py`): four of five truths should lie inside. Widths are split-conformal: the quantile of errors on
sources left out, by kind of software and offload, each source counted once (the fits of the others' errors have seen it), pulled towards that of all where sources are few, and
{unknown:.0%} wider for each setting that nobody printed. For this project's own engine memory's widths are those of
[rehearsals](rehearsal.md), by ZeRO stage; its time has no GPU profile yet, so the width of all software stands in.
- **Fits**: a run is said to fit where the probability is at least one half here; `toolkit estimate` and `toolkit tune` ask for
1 − `--risk`.

Every formula's docstring names its units and source. `toolkit/hardware/catalogue.yaml` holds the catalogue.
`toolkit/hardware/calibration.yaml` holds the scalars and says where they come from."""


def page(evaluation: Evaluation, *, pictures: Sequence[str]) -> str:
    """The whole page; pictures: names of the files beside it."""
    rows = evaluation.rows
    fitted_answers = evaluation.fitted
    fitted, held = measures.measure(rows, fitted_answers), measures.measure(rows, evaluation.held_out)
    parts = [
        "# The planner against published measurements",
        "",
        "Written by `make score-planner`; do not edit.",
        "",
        _fill(
            f"{held['rows']} scored rows (bf16 and fp16) of {len({r['source_id'] for r in rows})} sources. *Left out*: each source is predicted "
            "with every fitted constant, scalar and interval width refitted without it. *Fitted*: with all sources in the fit. The formulas "
            "and the priors of the constants were written with these sources in view, so expect unseen ones to lie further off."
        ),
        "",
        "| figure | left out | fitted | aim | reached |",
        "|---|---:|---:|---|---|",
        *(_target_line(target, held, fitted) for target in TARGETS),
        "",
        *(f"![{name.removesuffix('.svg').replace('planner-', '').capitalize()}]({name})" for name in pictures),
        "",
        "## By source",
        "",
        "Signed: median of predicted over measured, less one. Inside: share of truths in the 80 % interval.",
        "",
        "| source | rows | throughput, left out | signed | fitted | inside | memory rows | memory, left out | inside |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *_source_lines(held, fitted),
        "",
        "## The fitted scalars",
        "",
        _fill(
            "One per GPU and precision: the share of the catalogue's matrix-multiply ceiling that training reaches. Each source counts once, "
            "whatever its number of rows, and half where its configurations are partly inferred."
        ),
        "",
        "| GPU | precision | scalar | rows | bias left by source |",
        "|---|---|---:|---:|---|",
        *(_scale_line(entry) for entry in evaluation.fit.entries),
        "",
        "## The constants",
        "",
        _fill(
            "Every number of the formulas, and by how many percentage points the scores move when it is 20 % lower or higher. A fit moves the "
            "fitted ones within their range; *without a source* is how far leaving one out moves them."
        ),
        "",
        "| constant | value | throughput MdAPE −20 % / +20 % | memory MdAPE −20 % / +20 % | source, or what a fit chose it from |",
        "|---|---:|---:|---:|---|",
        *_constant_lines(evaluation, fitted),
        "",
        "## The widths",
        "",
        "Ends of the 80 % interval over the estimate, by class; the narrowest class that has errors counts.",
        "",
        "| class | tokens/s | memory |",
        "|---|---:|---:|",
        *_width_lines(evaluation),
        "",
        _fill(
            f"Two plans of one model on one machine are told apart if their expected throughputs differ by more than "
            f"{evaluation.comparison:.1%}: by so much comparisons of neighbours are off, in the median over sources."
        ),
        "",
        "## What is missing",
        "",
        *(_fill(f"- **{source}**: {text}", indent="  ") for source, text in MISSING.items()),
        "",
        "## Wrong verdicts",
        "",
        "Rows whose fit is predicted wrongly with their source left out; estimate and device in GiB.",
        "",
        "| row | ran | estimate | device | said |",
        "|---|---|---:|---:|---:|",
        *_verdict_lines(rows, evaluation.held_out),
        "",
        "## Largest throughput errors",
        "",
        "| row | error, left out |",
        "|---|---:|",
        *_worst_lines(rows, evaluation.held_out),
        "",
        *_method(),
    ]
    return "\n".join(parts) + "\n"


def _method() -> list[str]:
    blocks: list[str] = []
    for line in _METHOD.format(unknown=spread.UNKNOWN).splitlines():
        if blocks and line and blocks[-1] and not line.startswith(("- ", "#")) and not blocks[-1].startswith("#"):
            blocks[-1] += " " + line
        else:
            blocks.append(line)
    return [_fill(block, indent="  " if block.startswith("- ") else "") for block in blocks]


def _fill(text: str, *, indent: str = "") -> str:
    """Wrap a paragraph of the page at 100 columns; lines after the first are indented."""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _at(scores: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = scores
    for name in path:
        value = value[name]
    return value


def _target_line(
    target: tuple[tuple[str, ...], str, float | None, float | None], held: Mapping[str, Any], fitted: Mapping[str, Any]
) -> str:
    path, text, least, most = target
    ours, other = _at(held, path), _at(fitted, path)
    aim = f"{least} to {most}" if least is not None and most is not None else f"≥ {least}" if least is not None else f"≤ {most}"
    if ours is None:
        return f"| {text} | – | – | {aim} | – |"
    off = max(0.0, (least or ours) - ours, ours - (most if most is not None else ours))
    return f"| {text} | {ours:.4g} | {other:.4g} | {aim} | {'yes' if off == 0 else f'no, by {off:.3g}'} |"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _source_lines(held: Mapping[str, Any], fitted: Mapping[str, Any]) -> list[str]:
    lines = []
    inside = {figure: held["intervals"][figure]["by_source"] for figure in ("throughput", "memory")}
    for source, h in held["per_source"].items():
        f = fitted["per_source"].get(source, {})
        lines.append(
            f"| {source} | {h['n_throughput']} | {_percent(h['throughput_mdape'])} | {_percent(h['throughput_signed_median'])} "
            f"| {_percent(f.get('throughput_mdape'))} | {_percent(inside['throughput'].get(source))} | {h['n_memory']} "
            f"| {_percent(h['memory_mdape'])} | {_percent(inside['memory'].get(source))} |"
        )
    return lines


def _scale_line(entry: Mapping[str, Any]) -> str:
    left = ", ".join(f"{source} {bias:+.1%}" for source, bias in entry["bias_left"].items())
    return f"| {entry['gpu']} | {entry['precision']} | {entry['scale']} | {entry['rows']} | {left} |"


def _constant_lines(evaluation: Evaluation, fitted: Mapping[str, Any]) -> list[str]:
    lines = []
    with constants.changed(**evaluation.fit.constants), spread.using(evaluation.widths):
        for field in fields(constants.Constants):
            value = getattr(constants.VALUES, field.name)
            moves = {name: [] for name in ("throughput", "memory")}  # type: dict[str, list[str]]
            for factor in (0.8, 1.2):
                with constants.changed(**{field.name: value * factor}):
                    scores = measures.measure(evaluation.rows, [predict(r, scales=evaluation.fit.scales) for r in evaluation.rows])
                for name, found in moves.items():
                    change = scores[name]["mdape_median_over_sources"] - fitted[name]["mdape_median_over_sources"]
                    found.append(f"{100 * change:+.2f}")
            meta = field.metadata
            if "source" in meta:
                text = meta["source"]
            else:
                others = [f.constants[field.name] for f in evaluation.left_out.values()]
                text = f"*fitted* in {_plain(meta['low'])} to {_plain(meta['high'])}, prior {_plain(meta['prior'])}: {meta['why']}; "
                text += f"without a source {_plain(min(others))} to {_plain(max(others))}"
            both = {name: " / ".join("0" if float(m) == 0 else m for m in found) for name, found in moves.items()}
            lines.append(f"| `{field.name}` | {_plain(value)} | {both['throughput']} | {both['memory']} | {text} |")
    return lines


def _plain(value: float) -> str:
    return f"{value / constants.GIB:.3g} GiB" if 1e7 < value < 2.5e9 and value != 5e8 else f"{value:.3g}"


def _width_lines(evaluation: Evaluation) -> list[str]:
    lines = []
    for name in sorted({*evaluation.widths["time"], *evaluation.widths["memory"]}):
        cells = []
        for part in ("time", "memory"):
            ends = evaluation.widths[part].get(name)
            cells.append(" to ".join(f"{2.718281828**end - 1:+.1%}" for end in ends) if ends else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _verdict_lines(rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row, answer in zip(rows, answers, strict=True):
        ran = (row.get("measured") or {}).get("fits")
        if measures.scored(row) and ran is not None and not answer.get("unsupported") and answer["fits"] != ran:
            capacity = read_row(row)[1].gpu.memory_gib
            lines.append(
                f"| {row['id']} | {'yes' if ran else 'no'} | {answer['peak_reserved_gib']:.1f} | {capacity:.1f} | {answer['p_fits']:.2f} |"
            )
    return lines


def _worst_lines(rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], *, most: int = 20) -> list[str]:
    errors = []
    for row, answer in zip(rows, answers, strict=True):
        measured = measures.true_rate(row) if measures.scored(row) else None
        if measured and answer.get("tokens_per_s_per_gpu"):
            errors.append((answer["tokens_per_s_per_gpu"] / measured - 1, str(row["id"])))
    errors.sort(key=lambda e: -abs(e[0]))
    return [f"| {name} | {error:+.1%} |" for error, name in errors[:most]]

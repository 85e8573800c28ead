"""A rehearsal as tables, and as one JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from toolkit.hardware.catalogue import Hardware
from toolkit.rehearse.play import Played

GIB = 2**30
PARTS = ("parameters", "gradients", "optimizer", "zero buffers", "activations", "logits", "working set")


BESIDE = ("evaluation", "save")  # what a run does between steps


def passes(answer: dict[str, Any]) -> float:
    """Kernels launched for one micro-batch, forward and backward."""
    runs = [i for i in answer["step"]["program"] if i[0] == "run" and i[3].startswith(("forward", "backward"))]
    return sum(len(i[2]) for i in runs) / answer["microbatches"]


def traffic(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """One step's messages by operation, group size and place: calls and bytes."""
    found: Counter[tuple[Any, ...]] = Counter()
    calls: Counter[tuple[Any, ...]] = Counter()
    for operation, group, nbytes, dtype, *_, place in answer["step"]["messages"]:
        ranks = answer["groups"][group]
        size = ranks["count"] if isinstance(ranks, dict) else len(ranks)
        key = (operation, size, dtype, place)
        found[key] += nbytes
        calls[key] += 1
    return [
        {"operation": k[0], "ranks": k[1], "dtype": k[2], "calls": calls[k], "nbytes": nbytes, "place": k[3]}
        for k, nbytes in found.most_common()
    ]


def as_json(hardware: Hardware, answers: Sequence[dict[str, Any]], played: Played) -> dict[str, Any]:
    """Everything but the single kernels, which the Chrome traces hold."""
    ranks = []
    for a in answers:
        parts = {part: {k: v for k, v in a[part].items() if k not in ("program", "messages")} for part in ("step", *BESIDE) if part in a}
        whole = {k: v for k, v in a.items() if k not in ("step", "groups", *BESIDE)}
        more = {"kernels_per_microbatch": passes(a), "traffic": traffic(a), "idle_s": played.idle_s.get(a["rank"])}
        ranks.append(whole | parts | more)
    return {
        "hardware": str(hardware),
        "step_s": played.step_s,
        "findings": [{"kind": f.kind, "text": f.text} for f in played.findings],
        "ranks": ranks,
    }


def text(hardware: Hardware, answers: Sequence[dict[str, Any]], played: Played, *, width: int) -> str:
    """Tables of memory, of messages and waits, and what is wrong."""
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115  rich wants a file beside its record
    memory = Table(title="Memory at the peak, GiB", title_justify="left")
    for column in ("rank", "stage", *PARTS, "peak", "reserved", "of"):
        memory.add_column(column, justify="right")
    for a in answers:
        parts = a["step"]["peak"]["parts"]
        memory.add_row(
            *(str(a["rank"]), str(a["stage"])),
            *(f"{parts.get(p, 0) / GIB:.2f}" for p in PARTS),
            *(f"{a['allocated'] / GIB:.2f}", f"{a['peak_reserved'] / GIB:.2f}", f"{hardware.gpu.memory_gib:g}"),
        )
    console.print(memory)
    table = Table(title="One step", title_justify="left")
    for column in ("rank", "peak in", "module", "kernels a micro-batch", "messages", "host waits", "idle s"):
        table.add_column(column, justify="left" if column in ("peak in", "module") else "right")
    for a in answers:
        step, peak = a["step"], a["step"]["peak"]
        waits = sum(n for *_, n in step["syncs"])
        idle = f"{played.idle_s.get(a['rank'], 0):.3f}"
        table.add_row(str(a["rank"]), peak["phase"], peak["module"], f"{passes(a):.0f}", str(len(step["messages"])), str(waits), idle)
    console.print(table)
    _host(console, answers)
    console.print(f"A step takes {played.step_s:.3f} s if kernels and messages take what the cost model says.")
    _wire(console, answers[0])
    _places(console, answers)
    for a in answers:
        if a["overdrawn"]:
            over = f"rank {a['rank']} needs {a['peak_reserved'] / GIB:.1f} GiB, and the GPU has {hardware.gpu.memory_gib:g}"
            console.print(f"Out of memory: {over} (most in {a['step']['peak']['phase']}, {a['step']['peak']['module']})")
    if played.findings:
        console.print("Ranks do not agree:")
        for f in played.findings:
            console.print(f"  {f.kind}: {f.text}")
    else:
        console.print("All messages of these ranks have their partners, in the same order, of the same size and type.")
    return console.export_text()


def _host(console: Console, answers: Sequence[dict[str, Any]]) -> None:
    """What offloading takes: memory of the host, and what a step reads and writes."""
    most = max(answers, key=lambda a: a["host"]["peak"])
    if most["host"]["pinned"]:
        locked = f"{most['host']['pinned'] / GIB:.2f} of it page-locked"
        console.print(f"Host memory of rank {most['rank']}: {most['host']['peak'] / GIB:.2f} GiB, {locked}.")
    disk = most["step"]["disk"]
    if disk:
        console.print(
            f"In a step it reads {disk.get('read', 0) / GIB:.2f} GiB from files and writes {disk.get('written', 0) / GIB:.2f} GiB."
        )


def _wire(console: Console, answer: dict[str, Any]) -> None:
    table = Table(title=f"Messages of rank {answer['rank']} in a step", title_justify="left")
    for column in ("operation", "ranks", "type", "calls", "GiB", "place"):
        table.add_column(column, justify="left" if column in ("operation", "place") else "right")
    for row in traffic(answer):
        table.add_row(row["operation"], str(row["ranks"]), row["dtype"], str(row["calls"]), f"{row['nbytes'] / GIB:.4f}", row["place"])
    if table.rows:
        console.print(table)


def _places(console: Console, answers: Sequence[dict[str, Any]]) -> None:
    """Where the host waits, and what runs on the CPU."""
    for title, key in (("The host waits for the device", "syncs"), ("Operators on the CPU", "elsewhere")):
        for part in ("step", *BESIDE):
            places: dict[tuple[str, str], list[tuple[int, int]]] = {}
            for a in answers:
                for what, place, count in a[part][key] if part in a else ():
                    places.setdefault((what, place), []).append((a["rank"], count))
            if places:
                console.print(f"{title} in {'an' if part == 'evaluation' else 'a'} {part}:")
            for (what, place), seen in places.items():
                most = max(count for _, count in seen)
                console.print(f"  up to {most} times: {what}, {place or 'within autograd'} (rank {seen[0][0]}, {len(seen)} in all)")

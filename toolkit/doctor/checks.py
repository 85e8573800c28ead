"""What is wrong with the hosts: each check compares the facts of all of them, and with what the config needs.

A check yields a Finding for each thing that is red or yellow, and one green where there is none.
Red: a run would fail, hang, compute on other code, or waste most of the hardware. Yellow: it would
run, and the user may want to know.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RED, YELLOW, GREEN = "red", "yellow", "green"
GIB, MIB = 1 << 30, 1 << 20
MIN_FILES = 1024  # open files of a process; a rank has some for each other rank
FILES_PER_RANK = 16
MIN_THREADS = 1024
SHM_PER_RANK = 64 * MIB  # NCCL's buffers between processes and the batches of data workers go through it
MIN_FREE = 1 * GIB
BYTES_PER_PARAMETER = 16  # of a checkpoint: weights and two moments in fp32, and 16-bit weights beside them
SLOW_WRITE_S = 2.0  # for 1 MiB
SKEW_RED_S, SKEW_YELLOW_S = 5.0, 0.5
HOARDED = 0.25  # of RAM in reserved huge pages that nobody uses


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row: what is found on which hosts, and what to do about it."""

    status: str
    check: str
    hosts: tuple[str, ...]
    found: str
    fix: str = ""


@dataclass(kw_only=True)
class Look:
    """All that one look has found out. Mappings go by host, in the order of the hostfile."""

    slots: dict[str, int]
    needs: dict[str, Any]  # of the config: checkpoint bytes, extensions, offload
    problems: dict[str, tuple[str, str]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    clocks: dict[str, dict[str, float]] = field(default_factory=dict)
    seen: dict[str, dict[str, bool]] = field(default_factory=dict)
    port: int = 0
    ports: dict[str, str | None] = field(default_factory=dict)
    links: list[dict[str, Any]] = field(default_factory=list)
    torch: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    all_reduce: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)  # by the rules, or by an export: what, fix
    built: dict[str, dict[str, str | None]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def several(self) -> bool:
        return len(self.slots) > 1

    def values(self, *path: str) -> dict[str, Any]:
        """A fact of each host that has it, by its keys from the outside in."""
        found = {}
        for host, facts in self.facts.items():
            value: Any = facts
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            found[host] = value
        return found


Check = Callable[[Look], Iterator[Finding]]


def judge(look: Look, checks: Sequence[Check]) -> list[Finding]:
    """All rows, red ones first."""
    rows = [row for check in checks for row in check(look)]
    return sorted(rows, key=lambda row: (RED, YELLOW, GREEN).index(row.status))


def odd_ones(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value of most hosts (the first host's where two are as common), and the hosts with another."""
    counts = Counter(map(repr, values.values()))
    common = max(values.values(), key=lambda v: counts[repr(v)])
    return common, {host: value for host, value in values.items() if repr(value) != repr(common)}


def reached(look: Look) -> Iterator[Finding]:
    for host, (what, fix) in look.problems.items():
        yield Finding(status=RED, check="reach", hosts=(host,), found=what, fix=fix)
    if not look.problems:
        how = "by ssh, with this toolkit" if look.several else "here"
        yield Finding(status=GREEN, check="reach", hosts=tuple(look.facts), found=f"{len(look.facts)} of {len(look.slots)} {how}")


def unknown(look: Look) -> Iterator[Finding]:
    """Facts that a probe could not find out."""
    for host, facts in look.facts.items():
        for name, value in facts.items():
            if isinstance(value, Mapping) and set(value) == {"error"}:
                yield Finding(status=YELLOW, check="probe", hosts=(host,), found=f"{name} could not be found out: {value['error']}")


def versions(look: Look) -> Iterator[Finding]:
    if not look.facts:
        return
    names = sorted({name for found in look.values("versions").values() for name in found or {}})
    common: dict[str, Any] = {}
    for name in names:
        common[name], odd = odd_ones(look.values("versions", name))
        for host, value in odd.items():
            if name == "code":
                what, fix = "its toolkit has other files than the others', under the same version", "Copy the same toolkit to all hosts."
            else:
                what = f"{name} {value or 'is missing'}, where the others have {common[name] or 'none'}"
                fix = f"Install {name} {common[name]} there." if common[name] else f"Remove {name} there, or install it on all hosts."
            yield Finding(status=RED, check="versions", hosts=(host,), found=what, fix=fix)
    for name in ("cuda", "nccl"):  # as torch itself says
        seen = {host: ranks[0].get(name) for host, ranks in look.torch.items() if ranks and "torch" in ranks[0]}
        if seen:
            common[name], odd = odd_ones(seen)
            for host, value in odd.items():
                what = f"torch's {name} is {value}, where the others have {common[name]}"
                yield Finding(status=RED, check="versions", hosts=(host,), found=what, fix="Install the same build of torch on all hosts.")
    shown = ("python", "toolkit", "torch", "deepspeed", "megatron-core", "cuda", "nccl", "driver")
    text = ", ".join(f"{name} {common[name]}" for name in shown if common.get(name))
    if not any(odd_ones(look.values("versions", name))[1] for name in names):
        yield Finding(status=GREEN, check="versions", hosts=tuple(look.facts), found=text)


def gpus(look: Look) -> Iterator[Finding]:
    lists = {host: value for host, value in look.values("gpus").items() if isinstance(value, list)}
    if not lists:
        return
    if not any(lists.values()):
        yield Finding(status=GREEN, check="GPUs", hosts=tuple(lists), found="none: ranks train on the CPU")
        return
    names = {host: sorted({g["name"] for g in found if g["name"]}) for host, found in lists.items()}
    common, odd = odd_ones(names)
    bad = False
    for host, found in lists.items():
        if len(found) < look.slots[host]:
            bad = True
            what = f"{len(found)} GPUs for {look.slots[host]} ranks"
            yield Finding(status=RED, check="GPUs", hosts=(host,), found=what, fix=f"Set slots={len(found)}, or look at nvidia-smi there.")
        for i, gpu in enumerate(found):
            if gpu.get("ecc"):
                bad = True
                what = f"GPU {i} has {gpu['ecc']} uncorrected memory errors since its driver was loaded"
                yield Finding(status=RED, check="GPUs", hosts=(host,), found=what, fix="Reset that GPU, or take the host out.")
            if gpu.get("used") and gpu.get("memory") and gpu["used"] > 0.05 * gpu["memory"]:
                bad = True
                what = f"GPU {i} has {gpu['used']:,} of {gpu['memory']:,} MiB in use"
                yield Finding(status=YELLOW, check="GPUs", hosts=(host,), found=what, fix="Look at nvidia-smi there, and end what is left.")
        for rank, seen in enumerate(look.torch.get(host, [])):
            if "torch" in seen and not seen["gpus"]:
                bad = True
                what = f"torch of rank {rank} sees no GPU: torch {seen['torch']} is built for CUDA {seen['cuda'] or 'not at all'}"
                yield Finding(status=RED, check="GPUs", hosts=(host,), found=what, fix="Install torch for that driver.")
    for host, value in odd.items():
        bad = True
        what = f"{', '.join(value) or 'no GPU'}, where the others have {', '.join(common) or 'none'}"
        yield Finding(status=RED, check="GPUs", hosts=(host,), found=what, fix="Take hosts of one kind.")
    if not bad:
        count = sum(map(len, lists.values()))
        yield Finding(status=GREEN, check="GPUs", hosts=tuple(lists), found=f"{count} × {', '.join(common)}")


def estimated(look: Look) -> Iterator[Finding]:
    """What the estimate says of memory, against what these hosts have."""
    need = look.needs.get("memory_gib")
    if not need:
        return
    wrong, least = False, float("inf")
    for host, found in look.values("gpus").items():
        memory = min((gpu["memory"] * MIB / GIB for gpu in found or [] if gpu.get("memory")), default=None)
        if memory is None:
            continue
        least = min(least, memory)
        if need["high"] > memory:
            wrong = True
            status = RED if need["low"] > memory else YELLOW
            what = f"a GPU has {memory:.1f} GiB, and is likely to need {need['likely']:.1f} ({need['low']:.1f} to {need['high']:.1f})"
            fix = "toolkit estimate says what to change."
            yield Finding(status=status, check="estimate", hosts=(host,), found=what, fix=fix)
        ram = (look.facts[host].get("memory") or {}).get("total")
        if ram and need["host"] * GIB > ram:
            wrong = True
            what = f"{_size(ram)} RAM, and offloading is likely to need {need['host']:.1f} GiB"
            yield Finding(status=RED, check="estimate", hosts=(host,), found=what, fix="Offload less, or to NVMe, or take more hosts.")
    if not wrong and look.facts:
        what = f"a GPU is likely to need {need['likely']:.1f} of {least:.1f} GiB (80 %: {need['low']:.1f} to {need['high']:.1f})"
        yield Finding(status=GREEN, check="estimate", hosts=tuple(look.facts), found=what)


def needs(look: Look) -> Iterator[Finding]:
    """What the config asks of each host: packages, compiler, libaio, folders, rules, variables."""
    for what, fix in look.refused:
        yield Finding(status=RED, check="config", hosts=(), found=what, fix=fix)
    rows: dict[tuple[str, str], list[str]] = {}
    for host, unmet in look.values("unmet").items():
        for one in unmet if isinstance(unmet, list) else []:
            text = one["what"] if not one["why"] else f"{one['what']}: {one['why']}"
            rows.setdefault((text, one["fix"]), []).append(host)
    for (text, fix), hosts in rows.items():
        yield Finding(status=RED, check="needs", hosts=tuple(hosts), found=text, fix=fix)
    if not rows and not look.refused:
        yield Finding(status=GREEN, check="needs", hosts=tuple(look.facts), found="packages, compiler and libraries that the config needs")


def builds(look: Look) -> Iterator[Finding]:
    locked = False
    for host, found in look.values("builds").items():
        for build in found if isinstance(found, list) else []:
            locked = True
            if build["stale"]:
                what = f"{build['lock']} was left by a build that was killed {build['idle_s']:,.0f} s ago: a run would wait for it for ever"
                yield Finding(status=RED, check="builds", hosts=(host,), found=what, fix=f"Delete {build['lock']} there.")
            else:
                what = f"an extension is being compiled ({build['lock']})"
                yield Finding(status=YELLOW, check="builds", hosts=(host,), found=what, fix="Wait for it.")
    for host, built in look.built.items():
        for name, error in built.items():
            if error is not None:
                yield Finding(status=RED, check="builds", hosts=(host,), found=f"{name} could not be compiled: {error}", fix="See its log.")
    missing = {
        host: [n for n, there in found.items() if not there and look.built.get(host, {}).get(n, "") is not None]
        for host, found in look.values("built").items()
        if isinstance(found, Mapping)
    }
    for host, names in missing.items():
        if names:
            locked = True
            what = f"{', '.join(names)} will be compiled at the run's first use"
            yield Finding(status=YELLOW, check="builds", hosts=(host,), found=what, fix="toolkit doctor --build compiles it now.")
    if not locked:
        yield Finding(status=GREEN, check="builds", hosts=tuple(look.facts), found="no lock; extensions that the config needs are there")


def folders(look: Look) -> Iterator[Finding]:
    wrong = False
    free: list[int] = []
    for host, found in look.values("folders").items():
        for key, folder in (found or {}).items():
            if not isinstance(folder, Mapping) or "free" not in folder:
                continue
            path, need = folder["place"], MIN_FREE
            if key in ("run.dir", "checkpoint.dir") and look.needs.get("checkpoint_folder") == key:
                need = max(need, look.needs["checkpoint_bytes"])
            free.append(folder["free"])
            if folder["error"]:
                wrong = True
                what = f"{key}: {path} cannot be written to: {folder['error']}"
                yield Finding(status=RED, check="disk", hosts=(host,), found=what, fix="Mount it for writing and free it, or set another.")
            elif folder["free"] < need:
                wrong = True
                what = f"{key}: {path} has {_size(folder['free'])} free, and {_size(need)} are needed"
                yield Finding(status=RED, check="disk", hosts=(host,), found=what, fix="Free it, set another, or lower checkpoint.keep.")
            elif folder["free_files"] is not None and folder["free_files"] < 1000:
                wrong = True
                what = f"{key}: {path} has room for {folder['free_files']} more files"
                yield Finding(status=RED, check="disk", hosts=(host,), found=what, fix="Delete small files there, or set another folder.")
            elif folder["write_s"] > SLOW_WRITE_S:
                wrong = True
                what = f"{key}: writing 1 MiB to {path} took {folder['write_s']:.1f} s"
                yield Finding(status=YELLOW, check="disk", hosts=(host,), found=what, fix="Look at that disk's load.")
    for host, seen in look.seen.items():
        for key, there in seen.items():
            if not there:
                wrong = True
                kind = look.facts[host]["folders"][key]
                what = f"{key}: {kind['path']} is this host's own ({kind['type']}), and not the first host's"
                fix = f"Mount the same folder on all hosts, or set {key} to one."
                yield Finding(status=RED, check="shared", hosts=(host,), found=what, fix=fix)
    sizes: dict[str, dict[str, Any]] = {}
    for host, data in look.values("data").items():
        for path, size in (data or {}).items():
            sizes.setdefault(path, {})[host] = size
    for path, by_host in sizes.items():
        common, odd = odd_ones(by_host)
        for host, size in odd.items():
            wrong = True
            what = f"data: {path} {'is not there' if size is None else f'has {size:,}'}, where the others have {common:,}"
            yield Finding(
                status=RED, check="data", hosts=(host,), found=what, fix="Copy the data there, or keep it where all hosts see it."
            )
    if not wrong and free:
        yield Finding(status=GREEN, check="disk", hosts=tuple(look.facts), found=f"written to; least free {_size(min(free))}")


def clocks(look: Look) -> Iterator[Finding]:
    ahead = {host: clock["ahead_s"] for host, clock in look.clocks.items() if clock}
    if not look.several or not ahead:
        return
    middle = statistics.median_low(list(ahead.values())) if len(ahead) > 2 else next(iter(ahead.values()))
    off = {host: value - middle for host, value in ahead.items()}
    for host, seconds in off.items():
        if abs(seconds) > SKEW_YELLOW_S:
            status = RED if abs(seconds) > SKEW_RED_S else YELLOW
            what = f"its clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the others'"
            yield Finding(status=status, check="clock", hosts=(host,), found=what, fix="Set it by NTP (chronyd or systemd-timesyncd).")
    worst = max(map(abs, off.values()))
    if worst <= SKEW_YELLOW_S:
        yield Finding(status=GREEN, check="clock", hosts=tuple(off), found=f"within {worst * 1000:.0f} ms")


def limits(look: Look) -> Iterator[Finding]:
    ranks = sum(look.slots.values())
    need_files = max(MIN_FILES, FILES_PER_RANK * ranks)
    wrong = False
    for host, found in look.values("limits").items():
        if not isinstance(found, Mapping) or "error" in found:
            continue
        infiniband = bool((look.facts[host].get("host") or {}).get("infiniband"))
        has_gpus = bool(look.facts[host].get("gpus"))
        rows = [
            (found["nofile"], need_files, "nofile", f"{found['nofile']} open files, and {need_files:,} are needed"),
            (found["nproc"], MIN_THREADS, "nproc", f"{found['nproc']} processes and threads, and {MIN_THREADS:,} are needed"),
            (found["fsize"], look.needs.get("checkpoint_bytes") or GIB, "fsize", f"files end at {_size(found['fsize'] or 0)}"),
        ]
        if infiniband:
            rows.append((found["memlock"], GIB, "memlock", f"{_size(found['memlock'] or 0)} of locked memory, which InfiniBand needs"))
        if has_gpus or (found["as"] is not None and found["as"] < 16 * GIB):
            rows.append((found["as"], 1 << 47, "as", f"{_size(found['as'] or 0)} of address space"))
        for value, need, name, what in rows:
            if value is not None and value < need:
                wrong = True
                fix = f"Raise {name} in /etc/security/limits.conf there, and log in anew."
                yield Finding(status=RED, check="limits", hosts=(host,), found=f"ulimit {name}: {what}", fix=fix)
    if not wrong and look.facts:
        yield Finding(status=GREEN, check="limits", hosts=tuple(look.facts), found="open files, threads, file size, address space")


def memory(look: Look) -> Iterator[Finding]:
    found = {host: value for host, value in look.values("memory").items() if isinstance(value, Mapping) and "total" in value}
    if not found:
        return
    wrong = False
    for host, mem in found.items():
        ranks = look.slots[host]
        if mem["shm"] is None or mem["shm"]["free"] < SHM_PER_RANK * ranks:
            wrong = True
            size = "is missing" if mem["shm"] is None else f"has {_size(mem['shm']['free'])} free"
            what = f"/dev/shm {size}, and {ranks} rank{'s' * (ranks > 1)} need {_size(SHM_PER_RANK * ranks)}"
            fix = "Mount it larger (containers: --shm-size=8g or --ipc=host)."
            yield Finding(status=RED, check="memory", hosts=(host,), found=what, fix=fix)
        if mem["cores"] < ranks:
            wrong = True
            what = f"{mem['cores']} cores may be used by {ranks} ranks"
            yield Finding(status=RED, check="memory", hosts=(host,), found=what, fix="Give the job a core a rank, or set fewer slots.")
        if mem["hugepages_free"] > HOARDED * mem["total"]:
            wrong = True
            what = f"{_size(mem['hugepages_free'])} of {_size(mem['total'])} RAM are reserved as huge pages that nobody uses"
            yield Finding(status=YELLOW, check="memory", hosts=(host,), found=what, fix="Lower vm.nr_hugepages there.")
        if mem["available"] < 0.1 * mem["total"]:
            wrong = True
            what = f"{_size(mem['available'])} of {_size(mem['total'])} RAM are left"
            yield Finding(
                status=YELLOW, check="memory", hosts=(host,), found=what, fix="Look at top there, and end what is left of other runs."
            )
    common, odd = odd_ones({host: round(mem["total"] / GIB) for host, mem in found.items()})
    for host, value in odd.items():
        if abs(value - common) > 0.1 * common:
            wrong = True
            yield Finding(status=YELLOW, check="memory", hosts=(host,), found=f"{value} GiB RAM, where the others have {common}")
    if not wrong:
        cores = min(mem["cores"] for mem in found.values())
        shm = min(mem["shm"]["free"] for mem in found.values())
        what = f"{common} GiB RAM, {cores} cores, {_size(shm)} free in /dev/shm"
        yield Finding(status=GREEN, check="memory", hosts=tuple(found), found=what)


def security(look: Look) -> Iterator[Finding]:
    open_files = {host: value for host, value in look.values("open_to_all").items() if isinstance(value, list)}
    for host, paths in open_files.items():
        if paths:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            what = f"others can change what a run executes: {paths[0]}{more}"
            yield Finding(status=RED, check="security", hosts=(host,), found=what, fix="chmod o-w it, or delete what is not yours.")
    if open_files and not any(open_files.values()):
        yield Finding(status=GREEN, check="security", hosts=tuple(open_files), found="nothing that a run executes is writable by others")


def leftovers(look: Look) -> Iterator[Finding]:
    for host, ranks in look.values("ranks").items():
        if isinstance(ranks, list) and ranks:
            shown = ", ".join(map(str, ranks[:4]))
            what = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} of a run {'are' if len(ranks) > 1 else 'is'} still there: process {shown}"
            yield Finding(status=YELLOW, check="leftovers", hosts=(host,), found=what, fix="End them, unless they are a run of yours.")


def _size(count: float) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"

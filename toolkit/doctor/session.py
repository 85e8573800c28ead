"""One look at the hosts: start a probe on each, gather their facts, measure what lies between them,
and end the probes.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.cluster.environment import deepspeed_env_lines
from toolkit.cluster.needs import needed_extensions
from toolkit.config.schema import RunConfig
from toolkit.doctor.checks import BYTES_PER_PARAMETER, Look
from toolkit.doctor.hosts import Host, clock_offset, each, rounds
from toolkit.errors import ToolkitError
from toolkit.hardware.catalogue import gpu_of_device
from toolkit.parallel.rules import Machine, check
from toolkit.plan.ask import estimate

MOST_ROUNDS = 7  # of measured links: with 8 hosts or fewer every pair, with more 7 other hosts for each
BUILD_S = 1800.0


def examine(
    slots: Mapping[str, int],
    *,
    config: RunConfig | None,
    local: bool,
    port: int,
    build: bool = False,
    extra: Mapping[str, str] | None = None,
) -> Look:
    """Look at the hosts with their slots, in the order of the ranks. Raises nothing for what is
    wrong with them: that is the answer.

    local: the one host is this machine, and needs no ssh. port: where the ranks are to meet. build:
    compile the extensions that
    the config needs. extra: more folders to look at, by the name to show.
    """
    started = time.perf_counter()
    look = Look(slots=dict(slots), needs=_needs(config), port=port)
    hosts = [Host(name, local=local) for name in slots]
    try:
        each(hosts, Host.greet)
        look.problems = {host.name: host.problem for host in hosts if host.problem}
        present = [host for host in hosts if host.problem is None]
        _gather(look, present, config, extra or {})
        look.refused = _refused(config, look)
        look.needs["memory_gib"] = None if look.refused else _memory(config, look)
        if look.several:
            _between(look, [host for host in present if host.name in look.facts])
        _all_reduce(look, [host for host in present if host.name in look.facts])
        if build and look.needs["extensions"]:
            task = {"do": "build", "names": look.needs["extensions"]}
            answers = zip(present, each(present, lambda host: host.ask(task, timeout=BUILD_S)), strict=True)
            look.built = {host.name: answer.get("built") or {"build": answer["error"]} for host, answer in answers}
    finally:
        each(hosts, Host.close)
    look.seconds = time.perf_counter() - started
    return look


def _needs(config: RunConfig | None) -> dict[str, Any]:
    """What the checks hold the hosts against."""
    if config is None:
        return {"extensions": []}
    found: dict[str, Any] = {"extensions": needed_extensions(config)}
    if config.checkpoint.every and config.model.vocab_size is not None:
        kept = (config.checkpoint.keep or 1) + 1  # a new one is whole before an old one goes
        found["checkpoint_bytes"] = config.model.spec.unpadded_parameters * BYTES_PER_PARAMETER * kept
        found["checkpoint_folder"] = "checkpoint.dir" if config.checkpoint.dir else "run.dir"
    return found


def _folders(config: RunConfig | None) -> tuple[dict[str, str], list[str]]:
    """Folders to look at, by the key that names them, and which of them all hosts must see."""
    found = {"TMPDIR": tempfile.gettempdir()}
    if config is None:
        return found, []
    shared = {"run.dir": config.run.dir, "checkpoint.dir": config.checkpoint.dir, "data.cache_dir": config.data.cache_dir}
    given = {key: os.path.abspath(path.expanduser()) for key, path in shared.items() if path is not None}
    if config.zero.nvme_path is not None:
        found["zero.nvme_path"] = str(config.zero.nvme_path.expanduser())
    return {**found, **given}, list(given)


def _data(config: RunConfig | None) -> list[str]:
    """What the config reads, as far as it is here as a file, a folder or a prepared prefix."""
    if config is None:
        return []
    paths = [str(Path(p).expanduser().absolute()) for p in (config.data.source, *(config.data.blend or {})) if p]
    return [p for p in paths if Path(p).exists() or Path(f"{p}.bin").exists()]


def _gather(look: Look, hosts: list[Host], config: RunConfig | None, extra: Mapping[str, str]) -> None:
    folders, shared = _folders(config)
    folders |= extra
    token = secrets.token_hex(16)
    look.clocks = {host.name: offset for host, offset in zip(hosts, each(hosts, clock_offset), strict=True)}
    task = {
        "do": "look",
        "config": None if config is None else config.model_dump(mode="json"),
        "folders": folders,
        "data": _data(config),
        "extensions": look.needs["extensions"],
        "hosts": list(look.slots),
        "first": next(iter(look.slots)),
        "network": look.several,
        "token": token,
        "shared": [folders[key] for key in shared],
    }
    first = hosts[0] if hosts else None
    answers = each(hosts, lambda host: host.ask({**task, "slots": look.slots[host.name], "mark": look.several and host is first}))
    for host, answer in zip(hosts, answers, strict=True):
        if "versions" in answer:
            look.facts[host.name] = answer
        else:
            look.problems[host.name] = (f"its probe failed: {answer.get('error')}", f"Look at `ssh {host.name} true`.")
    if look.several and first is not None and first.name in look.facts:
        told = look.facts[first.name]["folders"]
        places = {key: told[key]["place"] for key in shared if "place" in told.get(key, {})}
        others = [host for host in hosts[1:] if host.name in look.facts]
        answers = each(others, lambda host: host.ask({"do": "see", "places": places}))
        look.seen = {host.name: answer["seen"] for host, answer in zip(others, answers, strict=True) if "seen" in answer}


def _refused(config: RunConfig | None, look: Look) -> list[tuple[str, str]]:
    """What no host is to blame for: a variable that cannot be exported, a config that the rules
    refuse for these ranks.
    """
    found = []
    if look.several:
        try:
            deepspeed_env_lines()
        except ToolkitError as error:
            found.append((f"{error.what}: {error.why}", error.fix))
    if config is not None and look.facts:
        cuda = any(isinstance(gpus, list) and gpus for gpus in look.values("gpus").values())
        engine = all(v is not None for v in look.values("versions", "transformer-engine").values())
        try:
            check(config.model_copy(deep=True), sum(look.slots.values()), machine=Machine(cuda=cuda, transformer_engine=engine))
        except ToolkitError as error:
            found.append((error.what if not error.why else f"{error.what}: {error.why}", error.fix or "Change what each line names."))
    return found


def _memory(config: RunConfig | None, look: Look) -> dict[str, float] | None:
    """GiB that the estimate gives a GPU (likely, and the ends of its interval) and a host; None
    without GPUs of one known kind.
    """
    kinds = {gpu_of_device(gpu["name"]) for gpus in look.values("gpus").values() if isinstance(gpus, list) for gpu in gpus if gpu["name"]}
    gpu = kinds.pop() if len(kinds) == 1 else None
    if config is None or gpu is None or len(set(look.slots.values())) > 1:
        return None
    hardware = f"{gpu.name}:{next(iter(look.slots.values()))}x{len(look.slots)}"
    try:
        said = estimate(config, hardware)
    except ToolkitError:
        return None  # data that is not prepared yet: the run says what is wrong with it
    low, high = said["range"]["peak_device_gib"]
    return {"likely": said["peak_device_gib"], "low": low, "high": high, "host": said["host_gib_per_node"]}


def _between(look: Look, hosts: list[Host]) -> None:
    """The port where ranks meet, and the links, one pair of a host at a time. Ranks of the
    all-reduce have started up before.
    """
    answers = each(hosts, lambda host: host.ask({"do": "torch"}))
    look.torch = {host.name: answer.get("ranks", []) for host, answer in zip(hosts, answers, strict=True)}
    by_name = {host.name: host for host in hosts}
    address = {host: found["network"]["address"] for host, found in look.facts.items() if found["network"]}
    first = next(iter(look.slots))
    if address.get(first):
        opened = by_name[first].ask({"do": "open", "port": look.port})
        look.ports = {first: opened["error"]}
        if opened["error"] is None:
            others = [host for host in hosts if host.name != first]
            task = {"do": "connect", "address": address[first], "port": look.port}
            answers = each(others, lambda host: host.ask(task))
            look.ports |= {host.name: answer["error"] for host, answer in zip(others, answers, strict=True)}
    for pairs in rounds([name for name in by_name if address.get(name)], most=MOST_ROUNDS):
        # each pair by its first name alone: the two directions are measured one after the other, by that host
        asked = {a: {"do": "link", "address": address[b], "port": look.facts[b]["port"]} for a, b in pairs}
        answers = each([by_name[a] for a in asked], lambda host, tasks=asked: host.ask(tasks[host.name]))  # type: ignore[misc]
        measured = dict(zip(asked, answers, strict=True))
        for a, b in pairs:
            link = {"us": None, "out_gb_s": None, "in_gb_s": None, "error": None} | measured[a]
            look.links.append({"from": a, "to": b, "us": link["us"], "gb_s": link["out_gb_s"], "error": link["error"]})
            if link["error"] is None:
                look.links.append({"from": b, "to": a, "us": link["us"], "gb_s": link["in_gb_s"], "error": None})


def _all_reduce(look: Look, hosts: list[Host]) -> None:
    """One all-reduce over a rank of each host without GPUs, or of each GPU; nothing where there is
    one rank, or hosts differ in that.
    """
    if not look.several:
        answers = each(hosts, lambda host: host.ask({"do": "torch"}))
        look.torch = {host.name: answer.get("ranks", []) for host, answer in zip(hosts, answers, strict=True)}
    ranks = {host: found for host, found in look.torch.items() if found and all("torch" in rank for rank in found)}
    world = sum(map(len, ranks.values()))
    with_gpus = {bool(rank["gpus"]) for found in ranks.values() for rank in found}
    if world < 2 or len(with_gpus) > 1 or len(ranks) < len(look.slots):
        return
    network = look.facts[hosts[0].name]["network"]
    address = (network or {}).get("address") or "127.0.0.1"
    meeting = hosts[0].ask({"do": "meet", "address": address})
    if "port" not in meeting:
        look.all_reduce = {hosts[0].name: [{"error": meeting.get("error", "no meeting point")}]}
        return
    starts, next_rank = {}, 0
    for host in hosts:
        starts[host.name] = next_rank
        next_rank += len(ranks[host.name])
    task = {"do": "all_reduce", "world": world, "address": address, "port": meeting["port"]}
    answers = each(hosts, lambda host: host.ask({**task, "rank": starts[host.name]}))
    look.all_reduce = {
        host.name: answer.get("ranks") or [{"error": answer.get("error")}] for host, answer in zip(hosts, answers, strict=True)
    }

"""What is wrong between the hosts: names, interfaces, ports, links, and the all-reduce, held
against the hardware catalogue.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

from toolkit.doctor import checks
from toolkit.doctor.checks import GREEN, RED, YELLOW, Finding, Look, odd_ones
from toolkit.hardware.catalogue import Gpu, find_gpu, gpu_of_device

# a single TCP stream fills a fast network only in part, and so does an all-reduce of one size
LINK_SHARE = 0.1  # of the catalogue's network bandwidth: below it a link is red
SLOWEST_SHARE = 0.2  # of the fastest link of the same cluster
ALL_REDUCE_SHARE = 0.3
SLOW_US, TOO_SLOW_US = 1_000.0, 20_000.0


def names(look: Look) -> Iterator[Finding]:
    """Every host must know the first one, where the ranks meet, by the same address; and none is
    there twice.
    """
    if not look.several or not look.facts:
        return
    wrong = False
    first = next(iter(look.slots))
    for name in look.slots:
        # a host may know itself by a loopback address
        told = {host: value for host, value in look.values("names", name).items() if host != name}
        if not told:
            continue
        own = (look.facts.get(name, {}).get("network") or {}).get("addresses") or []
        for host, value in told.items():
            if value in own or not own:
                continue
            wrong = True
            knows = f"it knows {name} {'by no address' if value is None else f'as {value}'}"
            what = f"{knows}, which has {', '.join(a for a in own if not a.startswith('127.'))}"
            status = RED if name == first else YELLOW
            yield Finding(status=status, check="names", hosts=(host,), found=what, fix="Correct /etc/hosts there, or DNS.")
    addresses: dict[str, list[str]] = {}
    for host, address in look.values("network", "address").items():
        if address and not ipaddress.ip_address(address).is_loopback:
            addresses.setdefault(address, []).append(host)
    for address, same in addresses.items():
        if len(same) > 1:
            wrong = True
            what = f"they are one machine, {address}"
            yield Finding(status=RED, check="names", hosts=tuple(same), found=what, fix="Name it once in the hostfile, with all its slots.")
    if not wrong:
        yield Finding(status=GREEN, check="names", hosts=tuple(look.facts), found="all hosts know each other by the same addresses")


def interfaces(look: Look) -> Iterator[Finding]:
    if not look.several:
        return
    found = {host: value for host, value in look.values("network").items() if value}
    wrong = False
    for host, net in found.items():
        own = (look.facts[host].get("host") or {}).get("own_address")
        if net["name"] is None:
            wrong = True
            asked = f"GLOO_SOCKET_IFNAME={net['named']}" if net["named"] else "the route to the first host"
            what = f"{asked} names no interface with an address; there are {', '.join(net['all'])}"
            fix = "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to one that all hosts have."
            yield Finding(status=RED, check="interface", hosts=(host,), found=what, fix=fix)
        elif not net["up"]:
            wrong = True
            yield Finding(status=RED, check="interface", hosts=(host,), found=f"{net['name']} is down", fix=f"ip link set {net['name']} up")
        elif not net["named"] and (own is None or ipaddress.ip_address(own.split("%")[0]).is_loopback):
            wrong = True
            known = f"as {own}" if own else "by no address"
            what = f"it knows itself {known}, where gloo then listens: no other host reaches that"
            fix = f"Set GLOO_SOCKET_IFNAME={net['name']} (and NCCL_SOCKET_IFNAME), or correct its own line in /etc/hosts."
            yield Finding(status=RED, check="interface", hosts=(host,), found=what, fix=fix)
    used = {host: net for host, net in found.items() if net["name"]}
    if used:
        common, odd = odd_ones({host: net["mtu"] for host, net in used.items()})
        for host, value in odd.items():
            wrong = True
            what = f"{used[host]['name']} has MTU {value}, the others' have {common}: large messages get lost"
            fix = f"ip link set {used[host]['name']} mtu {common}"
            yield Finding(status=RED, check="interface", hosts=(host,), found=what, fix=fix)
        rate, slow = odd_ones({host: net["mbit"] for host, net in used.items()})
        for host, value in slow.items():
            if value and rate and value < rate:
                wrong = True
                what = f"{used[host]['name']} runs at {value:,} Mb/s, the others' at {rate:,}"
                yield Finding(status=RED, check="interface", hosts=(host,), found=what, fix="Look at its cable, port and switch.")
        if not wrong:
            shown = ", ".join(sorted({net["name"] for net in used.values()}))
            yield Finding(status=GREEN, check="interface", hosts=tuple(used), found=f"{shown}, MTU {common}")


def ports(look: Look) -> Iterator[Finding]:
    if not look.ports:
        return
    first, wrong = next(iter(look.slots)), False
    for host, error in look.ports.items():
        if error is None:
            continue
        wrong = True
        if host == first:
            what, fix = f"port {look.port}, where the ranks meet, cannot be had: {error}", "End that process, or set --master-port."
        else:
            what = f"it cannot reach {first} at port {look.port}, where the ranks meet: {error}"
            fix = "Open that port between the hosts, or set --master-port."
        yield Finding(status=RED, check="port", hosts=(host,), found=what, fix=fix)
    if not wrong:
        yield Finding(status=GREEN, check="port", hosts=tuple(look.ports), found=f"{look.port} on {first} is free, and reached from all")


def links(look: Look) -> Iterator[Finding]:
    if not look.links:
        return
    wrong = False
    gpu = _gpu(look)
    rates = [link["gb_s"] for link in look.links if link["error"] is None]
    fastest = max(rates, default=0.0)
    floor = max(LINK_SHARE * gpu.nic_gb_s, SLOWEST_SHARE * fastest)
    for link in look.links:
        way = f"to {link['to']}"
        if link["error"] is not None:
            wrong = True
            what = f"no connection {way} at a free port: {link['error']}"
            fix = "Open all ports between the hosts: gloo and NCCL take free ones."
            yield Finding(status=RED, check="link", hosts=(link["from"],), found=what, fix=fix)
        elif link["gb_s"] < floor:
            wrong = True
            what = f"{_rate(link['gb_s'])} {way}; the fastest link has {_rate(fastest)}, {gpu.name}'s network {_rate(gpu.nic_gb_s)}"
            fix = "Look at both hosts' cables, switch ports and the interface that is named."
            yield Finding(status=RED, check="link", hosts=(link["from"],), found=what, fix=fix)
        elif link["us"] is not None and link["us"] > SLOW_US:
            wrong = True
            status = RED if link["us"] > TOO_SLOW_US else YELLOW
            what = f"a round trip {way} takes {link['us'] / 1000:.1f} ms"
            yield Finding(status=status, check="link", hosts=(link["from"],), found=what, fix="Take hosts of one place.")
    if not wrong:
        trips = [link["us"] for link in look.links if link["us"] is not None]
        what = f"{len(look.links)} links, slowest {_rate(min(rates))} (one TCP stream), round trip up to {max(trips):.0f} µs"
        yield Finding(status=GREEN, check="link", hosts=tuple(look.facts), found=what)


def all_reduce(look: Look) -> Iterator[Finding]:
    broken = {host: rank["error"] for host, ranks in look.torch.items() for rank in ranks if "error" in rank}
    for host, error in broken.items():
        yield Finding(status=RED, check="torch", hosts=(host,), found=f"torch does not start: {error}", fix="Install torch anew there.")
    if not look.all_reduce:
        if look.several and not broken and look.facts:
            what = "not measured: hosts are missing, or some have GPUs and others none"
            yield Finding(status=YELLOW, check="all-reduce", hosts=tuple(look.facts), found=what, fix="First mend what is red.")
        return
    answers = [(host, rank) for host, ranks in look.all_reduce.items() for rank in ranks]
    failed = {host: rank["error"] for host, rank in answers if "error" in rank}
    if failed:
        reasons = sorted(set(failed.values()), key=list(failed.values()).count)
        what = f"it does not come to an end: {reasons[-1][:200]}"
        yield Finding(
            status=RED, check="all-reduce", hosts=tuple(failed), found=what, fix="First mend what is red in names, interface, link."
        )
        return
    first = answers[0][1]
    wrong_sum = tuple(host for host, rank in answers if not rank["right"])
    if wrong_sum:
        what = "its sum is wrong"
        yield Finding(
            status=RED, check="all-reduce", hosts=wrong_sum, found=what, fix="Take the host out: memory, GPU or network corrupts."
        )
        return
    rate, gpu = min(rank["gb_s"] for _, rank in answers), _gpu(look)
    expected = _expected(look, gpu)
    said = f"{_rate(rate)} bus bandwidth ({first['backend']}, {first['ranks']} ranks, {first['bytes'] >> 20} MiB); {gpu.name}: {_rate(expected)}"
    if gpu.accelerator and rate < ALL_REDUCE_SHARE * expected:
        fix = "Set NCCL_DEBUG=INFO to see which transport NCCL takes; look at NCCL_SOCKET_IFNAME and NCCL_IB_HCA."
        yield Finding(status=RED, check="all-reduce", hosts=tuple(look.all_reduce), found=said, fix=fix)
    else:
        yield Finding(status=GREEN, check="all-reduce", hosts=tuple(look.all_reduce), found=said)


def _expected(look: Look, gpu: Gpu) -> float:
    """GB/s that a ring over these hosts can have: the network of a host's GPUs together, or the
    links within one host.
    """
    within = gpu.link_gb_s or gpu.pcie_gb_s
    if not look.several:
        return within
    per_host = min(len(ranks) for ranks in look.all_reduce.values())
    return min(within, gpu.nic_gb_s * per_host) if per_host > 1 else gpu.nic_gb_s


def _gpu(look: Look) -> Gpu:
    """The catalogue's entry for what the hosts have; its entry for CPUs where there is no GPU, or
    one that it lacks.
    """
    seen: list[Any] = [gpu["name"] for gpus in look.values("gpus").values() if isinstance(gpus, list) for gpu in gpus]
    seen += [rank.get("name") for ranks in look.torch.values() for rank in ranks]
    return next((gpu for gpu in (gpu_of_device(name) for name in seen if name) if gpu), find_gpu("cpu"))


def _rate(gb_s: float) -> str:
    return f"{gb_s:.2f} GB/s" if gb_s >= 0.1 else f"{gb_s * 1000:.1f} MB/s"


# in the order of the table
ALL: tuple[checks.Check, ...] = (
    checks.reached,
    checks.versions,
    names,
    interfaces,
    ports,
    links,
    all_reduce,
    checks.gpus,
    checks.estimated,
    checks.needs,
    checks.builds,
    checks.folders,
    checks.memory,
    checks.limits,
    checks.clocks,
    checks.security,
    checks.leftovers,
    checks.unknown,
)

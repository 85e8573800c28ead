"""How long collectives take: bandwidth and latency of the links a group of ranks spans."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.cost.constants import VALUES, cached
from toolkit.hardware.catalogue import GB, Hardware


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that talk together: how many, how many of them in one fabric domain, and GB/s each can send."""

    size: int
    inside: int
    gb_s: float

    @property
    def across(self) -> int:
        """Fabric domains the group spans."""
        return -(-self.size // self.inside)

    @property
    def ring_latency(self) -> float:
        """Seconds a ring over the group needs for its steps alone: (n - 1) hops, some of them over the network."""
        hops = self.size - 1
        far = self.across if self.across > 1 else 0
        return max(0, hops - far) * VALUES.fabric_step + far * VALUES.network_step


def port(hardware: Hardware) -> float:
    """GB/s of the network that collectives give one GPU while all GPUs of a node send."""
    return hardware.nic_gb_s * (hardware.nic_share or VALUES.network_share)


@cached(maxsize=4096)
def group(hardware: Hardware, *, size: int, stride: int) -> Group:
    """The group of `size` ranks that lie `stride` apart in rank order (tp fastest, then cp, dp, pp).

    Bandwidth: inside a domain the fabric's; across domains the ring leaves each domain once per GPU the group
    has there, and a GPU's network share is what its neighbours in other groups leave it (NCCL builds that many rings).
    """
    gpu = hardware.gpu
    inside = max(1, min(size, hardware.domain // max(1, stride)))
    if gpu.link_gb_s > 0:
        fabric = gpu.link_gb_s * VALUES.fabric_share
    else:
        fabric = gpu.pcie_gb_s * VALUES.pcie_share
    if inside >= size:
        return Group(size=size, inside=size, gb_s=fabric)
    return Group(size=size, inside=inside, gb_s=min(fabric, port(hardware) * inside))


def gather_time(nbytes: float, *, over: Group) -> float:
    """Seconds of an all-gather or a reduce-scatter; nbytes: size of the whole (gathered) tensor.

    Ring algorithm: (n-1)/n of the bytes pass each link (Thakur et al. 2005; NCCL's performance notes).
    """
    n = over.size
    if n <= 1 or nbytes <= 0:
        return 0.0
    return VALUES.collective_start + over.ring_latency + nbytes * (n - 1) / n / (over.gb_s * GB)


def reduce_time(nbytes: float, *, over: Group) -> float:
    """Seconds of an all-reduce of nbytes: a reduce-scatter and an all-gather, with a tree's latency across domains."""
    n = over.size
    if n <= 1 or nbytes <= 0:
        return 0.0
    depth = max(1, (over.across - 1).bit_length())
    tree = 2 * (depth * VALUES.network_step + (over.inside - 1) * VALUES.fabric_step)
    latency = min(2 * over.ring_latency, tree) if over.across > 1 else 2 * over.ring_latency
    return VALUES.collective_start + latency + 2 * nbytes * (n - 1) / n / (over.gb_s * GB)


def exchange_time(nbytes: float, *, over: Group) -> float:
    """Seconds of an all-to-all in which each rank holds nbytes: (n-1)/n of them leave it, all at once."""
    n = over.size
    if n <= 1 or nbytes <= 0:
        return 0.0
    gb_s = over.gb_s if over.across == 1 else over.gb_s / max(1, over.inside)
    return VALUES.collective_start + over.across * VALUES.fabric_step + nbytes * (n - 1) / n / (gb_s * GB)


def send_time(nbytes: float, *, hardware: Hardware, distance: int) -> float:
    """Seconds to send nbytes to a rank `distance` away in rank order, over the fabric or one GPU's network share."""
    near = distance < hardware.domain
    gpu = hardware.gpu
    fabric = gpu.link_gb_s * VALUES.fabric_share if gpu.link_gb_s > 0 else gpu.pcie_gb_s * VALUES.pcie_share
    rate = fabric if near else port(hardware)
    return VALUES.collective_start + (VALUES.fabric_step if near else VALUES.network_step) + nbytes / (rate * GB)

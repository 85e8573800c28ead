"""The hardware catalogue: what a GPU and the machines around it can do, from datasheets, extensible by YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import ConfigError
from toolkit.hardware.cpu import CpuRates
from toolkit.parallel.case import Machine

_BUILT_IN = Path(__file__).with_name("catalogue.yaml")
GB = 1e9  # makers count bandwidth in powers of ten, memory figures here are GiB


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator; units are in the catalogue file's header."""

    name: str
    memory_gib: float
    tflops: Mapping[str, float]
    memory_gb_s: float
    units: int
    link_gb_s: float
    nic_gb_s: float
    pcie_gb_s: float
    host_gb_s: float
    attention: Mapping[str, tuple[float, float]]
    scale: str
    matmul: float = 0.75
    host_gib: float = 512.0
    gpus_per_node: int = 8
    domain: int | None = None
    accelerator: bool = True

    def __hash__(self) -> int:  # hash by name: names are unique, and mappings cannot be hashed
        return hash((self.name, self.scale, self.memory_gib))

    def peak(self, precision: str) -> float:
        """Dense FLOP/s in a precision; one the GPU lacks runs at its fp16 (fp8) or fp32 rate."""
        return self.tflops.get(precision, self.tflops["fp16" if precision == "fp8" else "fp32"]) * 1e12


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of equal nodes: GPU, GPUs per node, nodes, and one GPU's share of the node's network.

    nic_share: the part of that rate which collectives reach; 0 where nobody has measured it, for what InfiniBand reaches.
    cpu: what `toolkit calibrate` has measured of the nodes' processors, where ranks run on those; threads: of each such rank, 0 for
    its share of the cores. Neither enters a comparison: what is kept by cluster is of GPUs.
    """

    gpu: Gpu
    gpus_per_node: int
    nodes: int
    nic_gb_s: float
    nic_share: float = 0.0
    cpu: CpuRates | None = field(default=None, compare=False, repr=False)
    threads: int = field(default=0, compare=False)

    @property
    def count(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def units(self) -> str:
        """What ranks run on, as a reader would call it."""
        return "GPUs" if self.gpu.accelerator else "processes"

    @property
    def domain(self) -> int:
        """GPUs that reach each other without the network."""
        return self.gpu.domain or self.gpus_per_node

    @property
    def machine(self) -> Machine:
        """What the rules ask of such a node; Transformer Engine is taken to be installed beside a GPU."""
        return Machine(cuda=self.gpu.accelerator, transformer_engine=self.gpu.accelerator)

    def __str__(self) -> str:
        return f"{self.gpu.name}:{self.gpus_per_node}x{self.nodes}"


def catalogue(extra: Path | None = None) -> dict[str, Gpu]:
    """All GPUs by name, with those of a user's YAML file (same format) added or put in the place of built-in ones.

    Raises ConfigError naming the file, the GPU and the key that is wrong.
    """
    return dict(_built_in()[0] if extra is None else _with_spellings(extra)[0])


def find_gpu(name: str, *, extra: Path | None = None) -> Gpu:
    """The GPU of a name or a usual spelling of it; ConfigError with the nearest name otherwise."""
    from toolkit.config.explain import nearest

    gpus, spellings = _built_in() if extra is None else _with_spellings(extra)
    key = _plain(name)
    if key in spellings:
        return gpus[spellings[key]]
    near = nearest(key, spellings, cutoff=0.5)
    hint = f"Did you mean {spellings[near]}?" if near else ""
    raise ConfigError(f"hardware {name!r} is not a known GPU", fix=f"{hint} Known are {', '.join(gpus)}; a YAML file can add more.".strip())


def gpu_of_device(device: str) -> Gpu | None:
    """The GPU that a driver's device name means ("NVIDIA H100 80GB HBM3"); None where the catalogue lacks it, and for a CPU.

    Where no spelling is the whole name, the one with most of its words wins: memory and form factor come after the model.
    """
    gpus, spellings = _built_in()
    name = _plain(device)
    words = set(name.split("-"))
    fitting = {s: key for s, key in spellings.items() if set(s.split("-")) <= words and gpus[key].accelerator}
    if not fitting:
        return None
    return gpus[fitting[max(fitting, key=lambda s: (s == name, len(s.split("-")), len(s)))]]


def peak_flops(device: str, precision: str) -> float | None:
    """Dense FLOP/s of a device by the driver's name for it; None where it is not known (a CPU)."""
    gpu = gpu_of_device(device)
    return gpu.peak(precision) if gpu is not None else None


def parse_hardware(spec: str, *, extra: Path | None = None) -> Hardware:
    """Read `GPU:PER_NODExNODES`, for example h100-80gb:8x4; a missing part is one node of the maker's usual size.

    Raises ConfigError for another form, an unknown GPU or sizes below 1.
    """
    name, colon, size = spec.strip().rpartition(":")
    if not colon:
        name, size = spec.strip(), ""
    gpu = find_gpu(name, extra=extra)
    match = re.fullmatch(r"(\d+)(?:\s*[xX]\s*(\d+))?", size.strip()) if size else None
    if size and not match:
        raise ConfigError(f"hardware {spec!r} has no readable size", fix="Write GPU:GPUS_PER_NODExNODES, for example h100-80gb:8x4.")
    per_node, nodes = (int(match[1]), int(match[2] or 1)) if match else (gpu.gpus_per_node, 1)
    if not 1 <= per_node * nodes <= 10_000_000:
        raise ConfigError(f"hardware {spec!r} counts {per_node * nodes} GPUs", fix="Use at least 1 GPU on at least 1 node.")
    return Hardware(gpu=gpu, gpus_per_node=per_node, nodes=nodes, nic_gb_s=gpu.nic_gb_s)


def with_network(hardware: Hardware, *, nic_gb_s: float) -> Hardware:
    """The same machines with another network; nic_gb_s: GB/s of one GPU in one direction."""
    return replace(hardware, nic_gb_s=nic_gb_s)


def with_host_gib(hardware: Hardware, gib: float) -> Hardware:
    """The same machines with another RAM of a node, GiB; raises ConfigError for none."""
    if gib <= 0:
        raise ConfigError(f"--host-gib {gib:g} is not above 0", fix="Leave it out, or give the RAM of a node.")
    return replace(hardware, gpu=replace(hardware.gpu, host_gib=gib))


def _plain(name: str) -> str:
    text = re.sub(r"[\s_]+", "-", name.strip().lower())
    return re.sub(r"^(nvidia|amd|instinct|geforce|tesla)-", "", re.sub(r"^(nvidia|amd)-", "", text))


@lru_cache(maxsize=1)
def _built_in() -> tuple[dict[str, Gpu], dict[str, str]]:
    raw = _raw(_BUILT_IN)
    return _resolve(raw, {}, _BUILT_IN), _spellings(raw)


def _with_spellings(extra: Path) -> tuple[dict[str, Gpu], dict[str, str]]:
    built_in, added = _raw(_BUILT_IN), _raw(Path(extra))
    gpus, spellings = _built_in()
    return gpus | _resolve(added, built_in, Path(extra)), spellings | _spellings(added)


def _spellings(raw: Mapping[str, Any]) -> dict[str, str]:
    return {_plain(s): name for name, body in raw.items() for s in (*map(str, body.get("like") or ()), name)}


def _raw(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"hardware file {str(path)!r} cannot be read", why=reason, fix="Copy the form of the built-in catalogue."
        ) from None
    gpus = loaded.get("gpus") if isinstance(loaded, dict) else None
    if not isinstance(gpus, dict) or not all(isinstance(body, dict) for body in gpus.values()):
        raise ConfigError(
            f"hardware file {str(path)!r} has no gpus", fix='Start it with "gpus:" and one "name:" with its keys per GPU below.'
        )
    return {str(name): body for name, body in gpus.items()}


def _resolve(raw: Mapping[str, Any], below: Mapping[str, Any], source: Path) -> dict[str, Gpu]:
    return {name: _gpu(name, _merged(name, raw, below, source, ()), source) for name in raw}


def _merged(name: str, raw: Mapping[str, Any], below: Mapping[str, Any], source: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """An entry's keys over those of the one it extends: of the same file, else of the catalogue below it."""
    body = raw[name]
    parent = body.get("extends")
    if parent is None:
        return dict(body)
    if parent in raw and parent not in (*seen, name):
        return _merged(parent, raw, below, source, (*seen, name)) | dict(body)
    if parent in below:
        return _merged(parent, below, {}, source, ()) | dict(body)
    raise ConfigError(f"GPU {name!r} in {str(source)!r} extends {parent!r}", why="no other entry has that name", fix="Name a known one.")


def _gpu(name: str, body: dict[str, Any], source: Path) -> Gpu:
    known = {f.name for f in fields(Gpu)} - {"name"}
    for key in body:
        if key not in known | {"like", "extends"}:
            raise ConfigError(f"GPU {name!r} in {str(source)!r} has the unknown key {key!r}", fix=f"Keys are {', '.join(sorted(known))}.")
    values = {k: v for k, v in body.items() if k in known}
    values.setdefault("scale", name)
    values.setdefault("host_gib", Gpu.host_gib)
    values.setdefault("attention", {"flash2": [0.4, 0.3]})
    try:
        values["attention"] = {k: (float(f), float(b)) for k, (f, b) in values["attention"].items()}
        values["tflops"] = {k: float(v) for k, v in values["tflops"].items()}
        for key in ("memory_gib", "memory_gb_s", "link_gb_s", "nic_gb_s", "pcie_gb_s", "host_gb_s", "host_gib"):
            values[key] = float(values[key])
        gpu = Gpu(name=name, **values)
        bad = (
            min(
                *(gpu.memory_gib, gpu.memory_gb_s, gpu.units, gpu.nic_gb_s, gpu.pcie_gb_s, gpu.host_gb_s, gpu.host_gib, gpu.matmul),
                *gpu.tflops.values(),
            )
            <= 0
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"GPU {name!r} in {str(source)!r} is incomplete or not numeric", why=str(error), fix="Set every key.") from None
    if bad or "fp32" not in gpu.tflops:
        raise ConfigError(f"GPU {name!r} in {str(source)!r} needs sizes above 0 and tflops for fp32 at least", fix="Use datasheet values.")
    return gpu

"""A made-up machine for tests of the times on a CPU: rates that a person can multiply by hand."""

from __future__ import annotations

from itertools import product

from toolkit.hardware.cpu import COLLECTIVES, PIECES, WAYS, CpuRates, Curve, Grid, Setting

FLOP, BYTE, LAUNCH = 1e-11, 1e-10, 5e-6  # seconds on one core


def made_up(*, slower: float = 1.0, cores: int = 2) -> CpuRates:
    """100 GFLOP/s and 10 GB/s a core, 1 GB/s between processes; every second times `slower`."""
    return CpuRates(
        processor="made up",
        cores=cores,
        torch="2",
        measured="2026-01-01",
        settings=tuple(_setting(threads, ranks, slower) for threads, ranks in ((1, 1), (cores, 1), (1, cores))),
        host={
            "zero1": _host(slower, 1e-3, 1e-3, 2e-3),
            "zero2": _host(slower, 2e-3, 1e-3, 3e-3),
            "zero3": _host(slower, 2e-3, 2e-3, 4e-3),
            "gpt": _host(slower, 0.0, 0.0, -2e-4),
            "recompute": {"layer": slower * 7e-4},
            "tp": _host(slower, 1e-3, 5e-4, 1e-3),
            "sp": {"layer": slower * 3e-4},
            "pp": {"step": slower * 1e-3, "micro": slower * 5e-4},
            "dp1": {"step": slower * 1e-3},
            "dp2": _host(slower, 1e-3, 5e-4, 5e-4),
            "dp3": _host(slower, 1e-3, 5e-4, 1e-3),
        },
        collectives={name: Curve(tuple((b, slower * (1e-4 + 1e-9 * b)) for b in (64.0, 1e4, 1e6, 1e8))) for name in COLLECTIVES},
    )


def _host(slower: float, step: float, micro: float, layer: float) -> dict[str, float]:
    return {"step": slower * step, "micro": slower * micro, "layer": slower * layer}


def _setting(threads: int, ranks: int, slower: float) -> Setting:
    flop, byte = slower * FLOP / threads, slower * BYTE / threads
    sizes = (32.0, 1024.0)
    curve = Curve(tuple((n, slower * LAUNCH + 12 * byte * n) for n in (1e3, 1e5, 1e7)))
    return Setting(
        threads=threads,
        ranks=ranks,
        precision="fp32",
        multiplies={way: Grid((sizes,) * 3, dict.fromkeys(product(sizes, repeat=3), flop)) for way in WAYS},
        attention={
            way: Grid((sizes, (32.0, 64.0)), dict.fromkeys(product(sizes, (32.0, 64.0)), 4 * flop)) for way in ("forward", "backward")
        },
        pieces={name: (curve, curve) for name in PIECES},
    )

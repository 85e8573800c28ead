"""What a person calls the process groups that a rank belongs to."""

from __future__ import annotations

from toolkit.parallel.layout import Layout


def group_names(layout: Layout, rank: int) -> dict[tuple[int, ...], str]:
    """Names of this rank's process groups, by their ranks.

    Where two axes have the same ranks, the first axis names the group; the whole world comes last.
    """
    at = layout.coordinates(rank)
    ranks = range(layout.world_size)
    places = {r: layout.coordinates(r) for r in ranks}

    def along(*axes: str) -> tuple[int, ...]:
        fixed = [a for a in ("tp", "cp", "dp", "pp") if a not in axes]
        return tuple(r for r in ranks if all(getattr(places[r], a) == getattr(at, a) for a in fixed))

    pipeline = along("pp")
    groups = [
        (along("tp"), "tensor"),
        (along("cp"), "context"),
        (along("dp"), "data"),
        (along("dp", "cp"), "data"),
        (pipeline, "pipeline"),
        ((pipeline[0], pipeline[-1]), "embedding"),
        (along("tp", "pp"), "model"),
        (tuple(ranks), "world"),
    ]
    named: dict[tuple[int, ...], str] = {}
    for members, name in groups:
        if len(set(members)) > 1:
            named.setdefault(members, name)
    return named

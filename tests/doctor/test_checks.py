"""Doctor's judgement of what cannot be planted here: GPUs, and networks of a cluster; and what it
knows without a host.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config.load import load_config
from toolkit.doctor import session
from toolkit.doctor.checks import GREEN, RED, YELLOW, Finding, Look, estimated, gpus, odd_ones
from toolkit.doctor.facts import GPU_FIELDS, parse_gpus
from toolkit.doctor.hosts import clock_offset, rounds
from toolkit.doctor.network_checks import all_reduce, links

H100 = "NVIDIA H100 80GB HBM3"


def look(lists: dict[str, list[dict[str, Any]]], **more: Any) -> Look:
    found = Look(slots=dict.fromkeys(lists, 2), needs={}, **more)
    found.facts = {host: {"gpus": value} for host, value in lists.items()}
    return found


def bad(rows: Any) -> list[Finding]:
    return [row for row in rows if row.status in (RED, YELLOW)]


def smi(*rows: str) -> list[dict[str, Any]]:
    return parse_gpus("".join(f"{row}\n" for row in rows))


GOOD = f"{H100}, 570.86.15, 81559, 1, 0"


def test_lines_of_nvidia_smi() -> None:
    assert len(GPU_FIELDS) == 5
    found = smi(GOOD, "Tesla T4, 570.86.15, 15360, 3, [N/A]")
    assert found[0] == {"name": H100, "driver": "570.86.15", "memory": 81559, "used": 1, "ecc": 0}
    assert found[1]["ecc"] is None and smi("No devices were found") == []


def test_equal_gpus_are_green() -> None:
    rows = list(gpus(look({"a": smi(GOOD, GOOD), "b": smi(GOOD, GOOD)})))
    assert not bad(rows) and H100 in rows[0].found


@pytest.mark.parametrize(
    "there, words, status",
    [
        (smi(GOOD), "1 GPUs for 2 ranks", RED),
        ([], "0 GPUs for 2 ranks", RED),
        (smi(GOOD, GOOD.replace(", 0", ", 12")), "GPU 1 has 12 uncorrected memory errors", RED),
        (smi(GOOD, GOOD.replace("81559, 1,", "81559, 60000,")), "GPU 1 has 60,000 of 81,559 MiB in use", YELLOW),
        (smi(*[GOOD.replace(H100, "NVIDIA A100-SXM4-80GB")] * 2), "A100-SXM4-80GB, where the others have NVIDIA H100", RED),
    ],
)
def test_a_gpu_that_is_not_as_the_others(there: list[dict[str, Any]], words: str, status: str) -> None:
    rows = bad(gpus(look({"a": smi(GOOD, GOOD), "b": there, "c": smi(GOOD, GOOD)})))
    assert any(words in row.found and row.hosts == ("b",) and row.status == status and row.fix for row in rows), rows
    assert all(row.hosts == ("b",) for row in rows)


def test_a_torch_that_sees_no_gpu() -> None:
    seen = {"b": [{"torch": "2.9.0+cpu", "cuda": None, "gpus": 0}]}
    rows = bad(gpus(look({"a": smi(GOOD, GOOD), "b": smi(GOOD, GOOD)}, torch=seen)))
    assert len(rows) == 1 and "torch of rank 0 sees no GPU" in rows[0].found


LLAMA_8B = Path(__file__).parents[2] / "launch" / "recipes" / "llama3-8b.yaml"  # about 64 GiB on each of 8 GPUs


@pytest.mark.parametrize(
    "gib, offload, words, status",
    [
        (80, "none", "likely to need 64", GREEN),
        (66, "none", "likely to need 64", YELLOW),
        (40, "none", "a GPU has 40.0 GiB, and is likely to need 64", RED),
        (80, "cpu", "1.0 GiB RAM, and offloading is likely to need", RED),
    ],
)
def test_the_estimate_is_held_against_the_gpus(gib: int, offload: str, words: str, status: str) -> None:
    there = smi(*[GOOD.replace("81559", str(gib * 1024))] * 8)
    found = Look(slots={"a": 8}, needs={})
    found.facts = {"a": {"gpus": there, "memory": {"total": 1 << 30}}}
    found.needs["memory_gib"] = session._memory(load_config(LLAMA_8B, [f"zero.offload_optimizer={offload}"]), found)
    rows = list(estimated(found))
    assert [row.status for row in rows] == [status] and words in rows[0].found, rows


def test_nothing_is_estimated_for_gpus_that_the_catalogue_lacks() -> None:
    found = look({"a": smi(GOOD.replace(H100, "Some New GPU"), GOOD)})
    assert session._memory(load_config(LLAMA_8B, []), found) is None and not list(estimated(found))


def rank(gb_s: float, *, right: bool = True) -> dict[str, Any]:
    return {"backend": "nccl", "ranks": 4, "bytes": 1 << 28, "gb_s": gb_s, "right": right}


@pytest.mark.parametrize("gb_s, is_bad", [(80.0, False), (5.0, True)])
def test_an_all_reduce_is_held_against_the_catalogue(gb_s: float, is_bad: bool) -> None:
    found = look({"a": smi(GOOD, GOOD), "b": smi(GOOD, GOOD)})
    found.all_reduce = {host: [rank(gb_s), rank(gb_s)] for host in "ab"}
    rows = list(all_reduce(found))
    assert bool(bad(rows)) == is_bad and "h100" in rows[0].found  # two GPUs a host: 2 × 50 GB/s of its network


def test_a_wrong_sum_names_its_host() -> None:
    found = look({"a": smi(GOOD, GOOD), "b": smi(GOOD, GOOD)})
    found.all_reduce = {"a": [rank(90)], "b": [rank(90, right=False)]}
    assert [(row.status, row.hosts) for row in all_reduce(found)] == [(RED, ("b",))]


def test_the_slow_link_of_four_hosts_is_the_one_that_is_named() -> None:
    found = look({host: [] for host in "abcd"})
    pairs = [(a, b) for a in "abcd" for b in "abcd" if a != b]
    found.links = [{"from": a, "to": b, "us": 50.0, "gb_s": 0.2 if a == "c" else 1.1, "error": None} for a, b in pairs]
    assert [row.hosts for row in bad(links(found))] == [("c",)] * 3


def test_a_tie_is_decided_for_the_first_host() -> None:
    assert odd_ones({"a": 1, "b": 2}) == (1, {"b": 2})
    assert odd_ones({"a": 1, "b": 2, "c": 2}) == (2, {"a": 1})


@given(count=st.integers(2, 24), most=st.integers(1, 30))
def test_each_pair_of_hosts_is_measured_once_and_no_host_twice_at_a_time(count: int, most: int) -> None:
    names = [f"n{i}" for i in range(count)]
    made = rounds(names, most=most)
    for pairs in made:
        assert max(Counter(name for pair in pairs for name in pair).values()) == 1
    pairs_of_all = Counter(frozenset(pair) for pairs in made for pair in pairs)
    assert max(pairs_of_all.values()) == 1
    if most >= count:
        assert len(pairs_of_all) == count * (count - 1) // 2


def test_a_clock_is_taken_from_the_quickest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 4.0, 10.0, 10.2, 20.0, 21.0])  # when tasks go out and answers come back
    monkeypatch.setattr("toolkit.doctor.hosts.time.time", lambda: next(now))
    there = iter([0.0, 17.1, 99.0])

    class Asked:
        def ask(self, task: dict[str, str]) -> dict[str, float]:
            return {"now": next(there)}

    assert clock_offset(Asked()) == pytest.approx({"ahead_s": 7.0, "within_s": 0.1})  # type: ignore[arg-type]

"""The catalogue: names, specs, a user's own file, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import ConfigError
from toolkit.hardware.catalogue import catalogue, find_gpu, parse_hardware, peak_flops

NEEDED = "v100 a100-40gb a100-80gb a800 h100 h200 b200 gb200 rtx4090 l40s mi300x cpu"


@pytest.mark.parametrize("name", NEEDED.split())
def test_the_catalogue_holds(name: str) -> None:
    gpu = find_gpu(name)
    assert gpu.memory_gib > 0 and gpu.peak("bf16") > 0 and gpu.attention


def test_every_entry_is_complete() -> None:
    for gpu in catalogue().values():
        assert gpu.peak("bf16") > 0 and gpu.peak("fp8") > 0 and gpu.gpus_per_node >= 1
        assert all(0 < f < 1 and 0 < b < 1 for f, b in gpu.attention.values())


@pytest.mark.parametrize(
    ("spec", "name", "per_node", "nodes"),
    [
        ("h100-80gb:8x4", "h100-80gb", 8, 4),
        ("NVIDIA A100-SXM4-80GB:4", "a100-80gb", 4, 1),
        ("gb200", "gb200-186gb", 4, 1),
        ("RTX 4090: 2 x 3", "rtx4090-24gb", 2, 3),
    ],
)
def test_specs_are_read(spec: str, name: str, per_node: int, nodes: int) -> None:
    hardware = parse_hardware(spec)
    assert (hardware.gpu.name, hardware.gpus_per_node, hardware.nodes) == (name, per_node, nodes)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("h10:8x4", "Did you mean h100-80gb"),
        ("nonsense", "is not a known GPU"),
        ("h100:8x", "no readable size"),
        ("h100:0x4", "at least 1 GPU"),
        ("h100:8y4", "no readable size"),
        ("", "is not a known GPU"),
    ],
)
def test_wrong_specs_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_hardware(spec)


def test_a_users_file_adds_and_replaces(tmp_path: Path) -> None:
    extra = tmp_path / "mine.yaml"
    extra.write_text(
        "gpus:\n  h100-80gb: {extends: h200-141gb, memory_gib: 70}\n  x1: {extends: l40s-48gb, memory_gib: 96, like: [the x]}\n"
    )
    assert find_gpu("h100-80gb", extra=extra).memory_gib == 70
    assert find_gpu("the x", extra=extra).tflops["bf16"] == 362
    assert find_gpu("a100", extra=extra).name == "a100-80gb"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpus: 3", "has no gpus"),
        ("gpus: {a: {extends: b}}", "extends 'b'"),
        ("gpus: {a: {extends: a}}", "extends 'a'"),
        ("gpus: {a: {memory_gib: 3}}", "incomplete"),
        ("gpus: {a: {extends: cpu, colour: red}}", "unknown key 'colour'"),
        ("gpus: {a: {extends: cpu, memory_gib: -1}}", "above 0"),
        ("gpus: {a: {extends: cpu, tflops: fast}}", "not numeric"),
        ("gpus: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    extra = tmp_path / "mine.yaml"
    extra.write_text(text)
    with pytest.raises(ConfigError, match=words):
        catalogue(extra)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
    ],
)
def test_a_device_is_known_by_the_name_its_driver_gives_it(device: str, name: str) -> None:
    assert find_gpu(device).name == name


# what torch.cuda.get_device_name() says of GPUs in the catalogue, and their dense 16-bit TFLOP/s
DEVICES = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "Tesla V100-SXM2-32GB": 15.7,  # bf16, which it emulates
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2450,
}


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_by_its_drivers_name(device: str) -> None:
    peak = peak_flops(device, "bf16")
    assert peak is not None and peak / 1e12 == pytest.approx(DEVICES[device], rel=0.01)


@pytest.mark.parametrize("device", ["cpu", "AMD EPYC", "NVIDIA GeForce GTX 1080"])
def test_an_unknown_device_has_no_peak(device: str) -> None:
    assert peak_flops(device, "bf16") is None


@pytest.mark.parametrize("name", [name for name, gpu in catalogue().items() if gpu.accelerator])
def test_every_gpu_of_the_catalogue_has_a_peak(name: str) -> None:
    assert peak_flops(f"NVIDIA {name.upper()}", "bf16") == catalogue()[name].peak("bf16")

"""The figures of a CPU: between what was measured, and in a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.cost.machines import made_up
from toolkit.calibrate.session import write
from toolkit.errors import ConfigError
from toolkit.hardware import calibration
from toolkit.hardware.catalogue import parse_hardware
from toolkit.hardware.cpu import Curve, Grid, from_yaml, load_cpu, to_yaml

sizes = st.lists(st.floats(1, 1e9), min_size=1, max_size=6, unique=True).map(sorted)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    places = draw(sizes)
    times = sorted(draw(st.lists(st.floats(1e-7, 10), min_size=len(places), max_size=len(places))))
    return Curve(tuple(zip(places, times, strict=True)))


@given(curves(), st.floats(0.5, 1e10), st.floats(1, 10))
def test_a_curve_goes_through_its_points_and_never_falls(curve: Curve, size: float, times: float) -> None:
    assert all(curve.at(x) == pytest.approx(s) for x, s in curve.points)
    assert curve.at(size) <= curve.at(size * times) * (1 + 1e-9)
    assert curve.beyond_start(curve.points[0][0]) == 0


@given(curves())
def test_beyond_its_points_a_curve_grows_with_the_size(curve: Curve) -> None:
    size, seconds = curve.points[-1]
    assert curve.at(3 * size) == pytest.approx(3 * seconds)


@given(st.floats(1, 1e6), st.floats(1, 1e6))
def test_a_grid_stays_between_its_corners_and_at_its_edge(x: float, y: float) -> None:
    values = {(10.0, 20.0): 1.0, (10.0, 200.0): 2.0, (100.0, 20.0): 3.0, (100.0, 200.0): 8.0}
    grid = Grid(((10.0, 100.0), (20.0, 200.0)), values)
    assert 1 <= grid.at(x, y) <= 8 + 1e-9
    assert all(grid.at(*place) == pytest.approx(value) for place, value in values.items())
    assert grid.at(math.sqrt(1000), 20) == pytest.approx(math.sqrt(3))


def test_what_was_measured_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    write(made_up(), path)
    read = load_cpu(path)
    assert read is not None
    assert to_yaml(read) == to_yaml(made_up())
    assert calibration.load(path) == {}


def _broken(**changes: Any) -> dict[str, Any]:
    return to_yaml(made_up()) | changes


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (_broken(format=9), "its format is 9, and this toolkit reads 1"),
        (_broken(settings=[]), "no settings"),
        ({k: v for k, v in _broken().items() if k != "host"}, "lacks 'host'"),
        (_broken(settings=[{**_broken()["settings"][0], "pieces": {}}]), "lacks 'rms_norm'"),
        (_broken(collectives={"send": [[64, 1e-3], [32, 1e-3]]}), "sizes do not grow"),
        (["cpu"], "indices"),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(raw: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)mine.yaml.*" + says):
        from_yaml(raw, path=Path("mine.yaml"))


def test_a_file_of_gpus_says_nothing_of_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.yaml"
    path.write_text("scales: [{gpu: h100, precision: bf16, scale: 0.8}]")
    with pytest.raises(ConfigError, match=r"no figures of a CPU.*it is of h100.*toolkit calibrate"):
        calibration.measured(parse_hardware("cpu:2"), path)
    gpus = parse_hardware("h100-80gb:8")
    assert calibration.measured(gpus, path) is gpus
    path.write_text("scales: [{gpu: cpu, precision: fp32, scale: 0.8}]")  # fitted to runs on a CPU
    assert calibration.measured(parse_hardware("cpu:2"), path).cpu is None


def test_threads_follow_the_environment_and_another_machine_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"scales": [], "cpu": to_yaml(made_up())}))
    found = calibration.measured(parse_hardware("cpu:2"), path, environ={"OMP_NUM_THREADS": "3"})
    assert found.threads == 3
    assert calibration.measured(parse_hardware("cpu:2"), path, environ={}).threads == 0
    assert "figures of made up, 2 cores" in calibration.remark(found) and "so the times are that machine's" in calibration.remark(found)

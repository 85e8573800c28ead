"""The report as a real browser shows it."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest

from tests.profile.conftest import Profiled
from tests.report.conftest import Browser
from toolkit.report.page import page
from toolkit.runfolder.read import read_runs

CHARTS = {
    "loss",
    "grad-norm",
    "throughput",
    "lr",
    "step-s",
    "memory",
    "expected",
    "memory-parts",
    "memory-time",
    "step-time",
    "pipeline",
    "tune",
}


@pytest.fixture
def report(profiled: Profiled, plan: Path, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(page(read_runs([profiled.folder, plan])), encoding="utf-8")
    return path


def test_every_chart_is_drawn_and_nothing_is_fetched(report: Path, browser: Browser, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    dom = browser.run(report, "--dump-dom", f"--log-net-log={log}")
    root = re.search(r"<html[^>]*>", dom)
    assert root and 'data-ready="yes"' in root[0], "the script did not run to its end"
    assert "data-error" not in root[0], root[0]
    assert set(re.findall(r'data-chart="([^"]+)"', dom)) == CHARTS
    assert f'data-charts="{len(CHARTS)}"' in root[0]
    # every mark lies within its picture
    for width, height, body in re.findall(r'<svg[^>]*viewBox="0 0 (\d+) (\d+)"[^>]*>(.*?)</svg>', dom, re.S):
        for x, y in re.findall(r'<(?:rect|circle)[^>]*?\bc?x="([\d.-]+)" c?y="([\d.-]+)"', body):
            assert -1 <= float(x) <= float(width) + 1 and -1 <= float(y) <= float(height) + 1
    assert not asked_for(log)


def asked_for(log: Path) -> set[str]:
    """What a page requested over the network, from Chromium's log; what the browser asks for itself
    has no origin.
    """
    found = set()
    for line in log.read_text(errors="replace").splitlines():
        url, initiator = (re.search(rf'"{key}":"([^"]*)"', line) for key in ("url", "initiator"))
        if url and initiator and initiator[1] != "not an origin" and url[1].startswith(("http:", "https:", "ws:", "wss:")):
            found.add(url[1])
    return found


def test_a_page_that_asks_for_something_is_noticed(report: Path, browser: Browser, tmp_path: Path) -> None:
    url, log = "http://127.0.0.1:9/x.png", tmp_path / "net.json"
    asking = report.read_text().replace("</main>", f'<img src="{url}"></main>')
    report.write_text(asking)
    assert f"asked for {url}" in browser.run(report, "--dump-dom"), "the policy did not stop it"
    report.write_text(re.sub(r"<meta http-equiv[^>]*>", "", asking))
    browser.run(report, "--dump-dom", f"--log-net-log={log}")
    assert asked_for(log) == {url}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_is_not_blank(report: Path, browser: Browser, tmp_path: Path, scheme: str) -> None:
    shot = tmp_path / "shot.png"
    dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    browser.run(report, f"--screenshot={shot}", "--window-size=600,1400", *dark)
    pixels = rows(shot)
    assert len({bytes(row) for row in pixels}) > 200, "most rows of the picture are alike"
    corner = pixels[-1][:3]
    assert (sum(corner) > 600) == (scheme == "light"), corner


def rows(path: Path) -> list[bytearray]:
    """Pixel rows of an 8-bit PNG without interlacing, as Chromium writes them (PNG specification,
    section 9: filters).
    """
    data = path.read_bytes()
    at, packed, width, depth = 8, b"", 0, 3
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, depth = struct.unpack(">I", body[:4])[0], {2: 3, 6: 4}[body[9]]
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    raw, size = zlib.decompress(packed), width * depth
    found: list[bytearray] = []
    above = bytearray(size)
    for start in range(0, len(raw), size + 1):
        kind_, row = raw[start], bytearray(raw[start + 1 : start + 1 + size])
        for i in range(size) if kind_ else ():
            left, up, corner = (row[i - depth] if i >= depth else 0), above[i], (above[i - depth] if i >= depth else 0)
            if kind_ == 4:
                p = left + up - corner
                near = min((abs(p - left), 0, left), (abs(p - up), 1, up), (abs(p - corner), 2, corner))[2]
            row[i] = (row[i] + {1: left, 2: up, 3: (left + up) // 2}.get(kind_, near if kind_ == 4 else 0)) & 255
        found.append(row)
        above = row
    return found

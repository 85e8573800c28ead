"""What a killed writer leaves is gone when the next one comes, and what another one writes is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.files import Partial

WRITER = """
import sys, time
from pathlib import Path
from toolkit.files import Partial
with Partial(Path(sys.argv[1])) as p:
    (p.folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(600)
"""


def other_writer(final: Path) -> subprocess.Popen[str]:
    """Another process, once it writes."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(final)], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_only_what_is_abandoned_is_removed(tmp_path: Path) -> None:
    final = tmp_path / "new" / "of [this]"  # a name that a pattern would read otherwise
    killed, alive, neighbour = other_writer(final), other_writer(final), other_writer(tmp_path / "new" / "of [this] too")
    killed.kill()
    killed.wait()
    (tmp_path / "new" / ".partial-of [this]-0000").mkdir()  # without a lock: just being made
    neighbour.kill()
    neighbour.wait()
    assert len(list(final.parent.iterdir())) == 4
    with Partial(final) as partial:
        (partial.folder / "whole").write_text("x")
        assert len(list(final.parent.iterdir())) == 4, "one has gone, one has come"
        assert alive.poll() is None and len(list(final.parent.rglob("half"))) == 2
        partial.publish()
    assert [p.name for p in final.iterdir()] == ["whole"]
    alive.kill()
    alive.wait()


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Partial(tmp_path / "final"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())

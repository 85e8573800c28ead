"""Write what `toolkit estimate` expects of each recipe into its `# expected:` line.

python -m launch.expected          write them (make recipes)
"""

from __future__ import annotations

import re
from pathlib import Path

from toolkit.config.load import load_config
from toolkit.hardware.catalogue import parse_hardware
from toolkit.plan.show import estimate_json

RECIPES = Path(__file__).parent / "recipes"
EXPECTED = re.compile(r"^# expected: on (\S+?)(?::? .*)?$", re.M)


def hardware(text: str) -> str | None:
    """The GPU:PER_NODExNODES a recipe is meant for; None where it says none."""
    match = EXPECTED.search(text)
    return match[1].rstrip(":") if match else None


def expected(path: Path) -> dict[str, float]:
    """Memory of the fullest rank (GiB), seconds of a step and tokens a second of one GPU."""
    cluster = parse_hardware(hardware(path.read_text()))
    answer = estimate_json(load_config(path), cluster)
    tokens = answer["tokens_per_s_per_gpu"]
    return {"gib": answer["peak_device_gib"], "step": answer["step_s"], "tokens": tokens, "fits": answer["fits"]}


def written(path: Path) -> str:
    """The recipe with its line as it should be."""
    text, found = path.read_text(), expected(path)
    line = f"# expected: on {hardware(text)} {found['gib']:.1f} GiB a rank, {found['step']:.3g} s a step, {found['tokens']:,.0f} tokens/s a GPU"
    return EXPECTED.sub(line, text, count=1)


if __name__ == "__main__":
    for path in sorted(RECIPES.rglob("*.yaml")):
        if hardware(path.read_text()):
            path.write_text(written(path))

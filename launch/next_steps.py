"""Said after the quickstart: what was learnt, and what to do next."""

import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
print(f"""
loss {records[0]["loss"]:.2f} -> {records[-1]["loss"]:.2f} over {len(records)} steps; every step is in {run}/metrics.jsonl

Next:
  another layout, the same losses   toolkit train launch/recipes/quickstart.yaml parallel.tp=1 parallel.pp=2 zero.stage=3 --num-procs 2
  your own text                     toolkit train launch/recipes/quickstart.yaml data.source=PATH run.dir=runs/mine --num-procs 2
  a published shape                 toolkit train launch/recipes/llama3.2-1b.yaml
  several hosts                     launch/README.md
  all keys, all rules               docs/configuration.md, docs/rules.md
(`toolkit` is in .venv/bin)""")

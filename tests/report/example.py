"""`make report-example`: train, profile and tune small runs, and write docs/report.png from their report."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

CONFIG = "launch/recipes/quickstart.yaml"
KEYS = ("train.global_batch_size=16", "train.micro_batch_size=4", "train.steps=60", "train.eval_every=20", "log.every=20")
RUNS = {"pp2-zero1": ("parallel.tp=1", "parallel.pp=2"), "tp2-zero2": ("zero.stage=2",)}


def toolkit(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "toolkit.cli", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/report-example"))
    parser.add_argument("--out", type=Path, default=Path("docs/report.png"))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    shown = []
    for name, keys in RUNS.items():
        run = options.folder / name
        every = [CONFIG, *KEYS, *keys, f"train.steps={options.steps}", f"run.dir={run}"]
        if not (run / "profile.json").exists():
            toolkit("train", *every, "--num-procs", "2")
            toolkit("profile", *every, "--num-procs", "2")
        shown.append(str(run))
    plan = options.folder / "llama2-7b"
    verbs = subprocess.run([sys.executable, "-m", "toolkit.cli", "--help"], capture_output=True, text=True).stdout
    if " tune " in verbs and not plan.exists():
        toolkit("tune", "launch/recipes/llama2-7b.yaml", "--hardware", "h100-80gb:8x2", "--out", str(plan))
    shown += [str(plan)] if plan.exists() else []
    report = options.folder / "report.html"
    toolkit("report", *shown, "-o", str(report))
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit(f"{report} is written; a picture of it needs Chromium")
    profile = options.folder / "browser"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", f"--user-data-dir={profile}"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    subprocess.run(
        [
            *command,
            "--window-size=1200,3900",
            "--force-device-scale-factor=0.7",
            f"--screenshot={options.out.resolve()}",
            report.resolve().as_uri(),
        ],
        check=True,
    )


if __name__ == "__main__":
    main()

"""The bar that `toolkit data prepare` shows."""

from __future__ import annotations

import sys
from typing import Any

from toolkit.data.sources import Source


class PrepareBar:
    """A progress bar on stderr: bytes of text, documents and tokens so far."""

    def __init__(self, text: Source, *, shown: bool | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            console=console,
            disable=not (sys.stderr.isatty() if shown is None else shown),
        )
        # A compressed file's size says nothing about its text's.
        plain = text.size is not None and all(p.suffix in (".txt", ".py") for p in text.files)
        self._task = self._progress.add_task(f"preparing {text.spec}", total=text.size if plain else None, documents=0, tokens=0)
        self._documents = self._tokens = 0

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, record: dict[str, Any] | None) -> None:
        if record is not None:
            self._documents += record["documents"]
            self._tokens += record["tokens"]
            self._progress.update(self._task, advance=record["bytes"], documents=self._documents, tokens=self._tokens)

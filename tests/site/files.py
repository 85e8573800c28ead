"""mkdocs reads the pages where they lie in the project, so that one link is right both there and on the site.

docs/ alone would be too small a root: README.md, launch/, ds_configs/ and examples/ are linked from
many pages. Every page keeps its place, README.md becomes the front page.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SHOWN = (
    "*.md",
    "LICENSE",
    "docs/**/*.md",
    "docs/*.png",
    "docs/*.svg",
    "docs/assets/*",
    "launch/*",
    "launch/recipes/**/*",
    "ds_configs/*",
    "examples/*",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the files of the theme, and the project's own in the places that they have there."""
    from_theme = [file for file in files if not file.src_dir or Path(file.src_dir) != ROOT / "docs"]
    paths = sorted({path for pattern in SHOWN for path in ROOT.glob(pattern) if path.is_file()})
    return Files([*from_theme, *(_file(path, config) for path in paths)])


def _file(path: Path, config: MkDocsConfig) -> File:
    return File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)

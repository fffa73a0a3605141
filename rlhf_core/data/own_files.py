"""Links to the files that the sources name, in one directory that DVC's stage `prepare` depends on.

dvc.yaml names a stage's dependencies, and only params.yaml names a user's files. DVC follows links, so a file
that changes under its name makes the stage stale, for plain `dvc repro` too. git keeps the directory without
the links: whoever runs or plans the stage makes them again.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from rlhf_core.config import DataConfig
from rlhf_core.data.rows import KINDS
from rlhf_core.layout import Layout

NAME_CHARS = 50  # of a file, so that the link's name is not too long for any file system


def link_files(config: DataConfig, layout: Layout) -> None:
    """Let the links be those of `config`. A file that is missing has none; `prepare` says that it is."""
    wanted = {
        f"{kind}-{number}-{path.name[-NAME_CHARS:]}": path
        for kind in KINDS
        for number, path in enumerate(layout.root.resolve() / source for source in getattr(config, kind))
        if path.is_file()
    }
    layout.sources.mkdir(parents=True, exist_ok=True)
    found = {path.name: path.readlink() for path in layout.sources.iterdir() if path.is_symlink()}
    for name, target in found.items():
        if wanted.get(name) != target:
            (layout.sources / name).unlink(missing_ok=True)
    for name, path in wanted.items():
        if found.get(name) != path:
            _link(layout.sources / name, path)


def _link(link: Path, target: Path) -> None:
    with contextlib.suppress(FileExistsError):  # a plan beside a run makes the same
        link.symlink_to(target)

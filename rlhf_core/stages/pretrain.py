"""Stage `pretrain`: next-token training on the prepared text, every weight, before any instruction.

It makes a model of a random one (`model.source: scratch`), or goes on with the base's own pre-training on the
user's text. With `pretrain.num_steps: 0` the weights of the base pass through as they are.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rlhf_core import ranks
from rlhf_core.atomic import staged_dir
from rlhf_core.config import Params
from rlhf_core.layout import Layout
from rlhf_core.tracking import Tracker


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    if params.pretrain.num_steps == 0:
        if ranks.is_first():
            pass_through(layout.model("base"), layout.model("pretrained"))
        return {"pretrain/num_steps": 0}
    from rlhf_core.pretraining import pretrain  # with torch, which a model that passes through does not need

    return pretrain(params, layout, tracker)


def pass_through(source: Path, final: Path) -> None:
    """The same files under another name; linked where the file system can."""
    with staged_dir(final) as out:
        shutil.copytree(source, out, dirs_exist_ok=True, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

"""A workspace whose registry holds tiny policies; models and data behind them are in its DVC cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from rlhf_core.config import change_params
from rlhf_core.data.rows import SPLITS, write_rows
from rlhf_core.data.split import split_of
from rlhf_core.mlflow_writer import experiment_id, open_client

NAME = "rlhf-policy"
OUTPUTS = ("models/sft", "models/reward", "data/prepared")


def dvc(where: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def of_side(side: str, count: int, fraction: float) -> list[str]:
    texts = (f"how are you on day {i}, my friend?" for i in range(20 * count))
    return [text for text in texts if split_of(text, fraction) == side][:count]


def make_workspace(place: Path, root: Path, sft: Path, reward: Path, count: int = 30) -> dict[str, str]:
    """Fill `place`; the tags of a version that was made of what DVC holds there.

    On each side of the split it has `count` prompts.
    """
    place.mkdir()
    shutil.copyfile(root / "params.yaml", place / "params.yaml")
    (place / "flows").symlink_to(root / "flows")
    values = {"run.device": "cpu", "run.precision": "float32", "collect.num_prompts": 4}
    values |= {"collect.sampling.max_new_tokens": 6, "collect.sampling.temperature": 5.0}
    params = change_params(place / "params.yaml", values)
    dvc(place, "init", "--no-scm", "-q")
    shutil.copytree(sft, place / "models" / "sft")
    shutil.copytree(reward, place / "models" / "reward")
    for side in SPLITS:
        rows = [
            {"prompt": text, "messages": [{"role": "user", "content": text}], "source": "test", "row": i}
            for i, text in enumerate(of_side(side, count, params.data.eval_fraction))
        ]
        write_rows(place / "data" / "prepared" / "prompts" / f"{side}.parquet", rows, "prompts")
    dvc(place, "add", "-q", *OUTPUTS)
    tags = {"sft_model": f"{NAME}-sft/1"}
    for output in OUTPUTS:
        (out,) = yaml.safe_load((place / f"{output}.dvc").read_text())["outs"]
        tags[f"dvc.{output.replace('/', '.')}"] = out["md5"]
        shutil.rmtree(place / output)
    shutil.copyfile(root / "dvc.yaml", place / "dvc.yaml")  # now: DVC would find each output twice
    open_client(place).create_registered_model(NAME)
    return tags


def register(place: Path, tags: dict[str, str], directory: Path, *aliases: str) -> str:
    """A version whose weights are those in `directory`."""
    client = open_client(place)
    run = client.create_run(experiment_id(client, place))
    source = place / "versions" / run.info.run_id
    shutil.copytree(directory, source / "artifacts" / "policy")
    made = client.create_model_version(NAME, f"file://{source}", tags=tags)
    for alias in aliases:
        client.set_registered_model_alias(NAME, alias, made.version)
    return str(made.version)

"""Reward models on sets of human preferences, beside what length alone tells and a small sentence encoder.

    python -m benchmarks.preference_sets a.jsonl b.jsonl --seeds 0 1 2 --encoder DIRECTORY

Each file is split by prompt, and for each seed a reward model is trained on one part with the values of
params.yaml, from models/base. The encoder (a directory that transformers opens) is frozen; a logistic
regression on the difference of its sentence vectors is fitted on the same pairs.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from rlhf_core.config import Params, load_params
from rlhf_core.data.rows import SPLITS, read_rows, write_rows
from rlhf_core.evaluation.statistics import accuracy_with_interval, win_rates
from rlhf_core.layout import Layout
from rlhf_core.modeling.loading import load_tokenizer
from rlhf_core.modeling.pairs import encode_pair
from rlhf_core.stages.prepare import collect, split_rows
from rlhf_core.stages.runner import run_stage

Row = dict[str, Any]


def make_workspace(file: Path, base: Path, root: Path, params: Params, most: int) -> Layout:
    """A workspace whose preferences are the rows of `file` that fit, and whose SFT model is `base`."""
    layout = Layout(root)
    if layout.model("sft").exists():
        return layout
    data = params.data.model_copy(update={"preferences": (str(file.resolve()),)})
    found = collect("preferences", data, layout)
    tokenizer, longest = load_tokenizer(base), params.reward.max_length
    fitting = [row | {"source": f"human:{file.name}"} for row in found.kept]
    fitting = [row for row in fitting if len(encode_pair(tokenizer, row)) <= longest]
    split = split_rows(fitting, most, data.eval_fraction)
    for name in SPLITS:
        write_rows(layout.preferences / f"{name}.parquet", split[name], "preferences")
    shutil.copytree(base, layout.model("sft"))
    return layout


def train_and_judge(layout: Layout, params: Params, seed: int) -> list[bool]:
    """Which held-out pairs the reward model of `seed` puts in the right order."""
    kept = layout.root / f"pairs-{seed}.csv"
    if not kept.exists():
        seeded = params.model_copy(update={"run": params.run.model_copy(update={"seed": seed})})
        run_stage("reward", seeded, layout)
        shutil.copy(layout.pair_scores, kept)
    with kept.open() as file:
        return [float(row["chosen"]) > float(row["rejected"]) for row in csv.DictReader(file)]


def length_judge(train: Sequence[Row], held_out: Sequence[Row]) -> list[float]:
    """The rule of length that is right more often on the training pairs; equal lengths count one half."""

    def longer(rows: Sequence[Row]) -> list[float]:
        return win_rates([len(row["chosen"]) for row in rows], [len(row["rejected"]) for row in rows])

    likes_long = 2 * sum(longer(train)) >= len(train)
    return [x if likes_long else 1.0 - x for x in longer(held_out)]


class Encoder:
    """Mean-pooled, normalised sentence vectors of a frozen encoder."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModel.from_pretrained(directory).eval()

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """(N, D)."""
        parts = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            mask = batch["attention_mask"][..., None].float()
            hidden = self.model(**batch).last_hidden_state
            parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts).numpy()

    def judge(self, train: Sequence[Row], held_out: Sequence[Row]) -> list[bool]:
        """Which held-out pairs a Bradley-Terry model on the vectors puts in the right order.

        Its ridge is chosen by cross-validation on the training pairs.
        """
        from sklearn.linear_model import LogisticRegressionCV

        differences = []
        for rows in (train, held_out):
            sides = [
                self.vectors([f"{row['prompt']}\n\n{row[side]}" for row in rows])
                for side in ("chosen", "rejected")
            ]
            differences.append(sides[0] - sides[1])
        x = np.concatenate([differences[0], -differences[0]])
        y = np.repeat([1, 0], len(train))
        order = np.argsort(np.tile(np.arange(len(train)), 2), kind="stable")  # a pair and its mirror together
        model = LogisticRegressionCV(Cs=np.logspace(-2, 3, 11), fit_intercept=False, max_iter=2000)
        model.fit(x[order], y[order])
        return [bool(score > 0) for score in differences[1] @ model.coef_[0]]


def row_of(file: Path, layout: Layout, params: Params, seeds: Sequence[int], encoder: Encoder | None) -> str:
    train, held_out = (read_rows(layout.preferences / f"{split}.parquet") for split in SPLITS)

    def shown(correct: Sequence[float]) -> str:
        prompts = [row["prompt"] for row in held_out]
        found = accuracy_with_interval(correct, prompts, confidence=params.reward.confidence, seed=0)
        return f"{found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})"

    by_seed = [train_and_judge(layout, params, seed) for seed in seeds]
    cells = [file.name.split(".")[0], f"{len(train)}, {len(held_out)}", *map(shown, by_seed)]
    cells.append(shown([fmean(pair) for pair in zip(*by_seed, strict=True)]))
    cells.append(shown(length_judge(train, held_out)))
    if encoder is not None:
        cells.append(shown(encoder.judge(train, held_out)))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--most", type=int, default=1000, help="pairs used of a file")
    parser.add_argument("--directory", type=Path, default=Path(".rlhf/preference-sets"))
    options = parser.parse_args()
    os.environ["RLHF_TRACKING"] = "off"
    here = Layout.here()
    params = load_params(here.params)
    encoder = Encoder(options.encoder) if options.encoder else None
    names = ["set", "pairs: train, held out", *(f"seed {seed}" for seed in options.seeds), "mean of seeds"]
    names += ["length alone"] + (["encoder"] if encoder else [])
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for file in options.files:
        root = options.directory.resolve() / file.name.split(".")[0]
        layout = make_workspace(file, here.model("base"), root, params, options.most)
        print(row_of(file, layout, params, options.seeds, encoder), flush=True)


if __name__ == "__main__":
    main()

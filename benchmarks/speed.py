"""Generation beside transformers' own: `python -m benchmarks.speed` (`rlhf bench generation`).

All in one run, alternating, since only ratios mean anything on a shared machine. Needs models/base.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

from benchmarks.clock import now
from benchmarks.endless import EndlessTokenizer
from rlhf_core.allocator import keep_freed
from rlhf_core.config import SamplingConfig, load_params
from rlhf_core.generation import generate
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt
from rlhf_core.modeling.loading import load_policy

QUESTIONS = (
    "How are you today?",
    "What do you like to do on weekends?",
    "Do you have any pets?",
    "Tell me a story.",
)
NEW_TOKENS = 32
CEILING_TRIES = 10  # of each size; a machine that others use too is seldom at its best
Seconds = list[float]


def matrix_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """The most FLOP/s that a large square matrix product was seen to reach."""
    most = 0.0
    for size in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a = torch.randn(size, size, dtype=dtype, device=device)
        a @ a
        for _ in range(CEILING_TRIES):
            started = now()
            a @ a
            most = max(most, 2 * size**3 / (now() - started))
    return most


def measure(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, Seconds]:
    """Seconds of each case, alternating, after one call of each to warm up."""
    for case in cases.values():
        case()
    seconds: dict[str, Seconds] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            started = now()
            case()
            seconds[name].append(now() - started)
    return seconds


class Writers:
    """The same prompts answered by this project and by transformers; EOS can stop neither."""

    def __init__(self, model: Any, tokenizer: Any, prompts: int, copies: int) -> None:
        self.model, self.tokenizer, self.copies = model, tokenizer, copies
        model.generation_config.eos_token_id = None
        self.endless = EndlessTokenizer(tokenizer)
        self.chats = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(prompts)]
        self.ids = [encode_prompt(tokenizer, messages) for messages in self.chats]

    def ours(self, new_tokens: int) -> None:
        sampling = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, seed=0)
        rows = len(self.chats) * self.copies
        generate(
            self.model,
            self.endless,  # type: ignore[arg-type]
            self.chats,
            sampling,
            samples_per_prompt=self.copies,
            batch_size=rows,
        )

    def continuous(self, new_tokens: int) -> None:
        """transformers' continuous batching; for several answers to a prompt it is given again."""
        wanted = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            eos_token_id=-1,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        ids = [p for p in self.ids for _ in range(self.copies)]
        self.model.generate_batch(inputs=ids, generation_config=wanted, progress_bar=False)

    def transformers(self, new_tokens: int) -> None:
        longest = max(map(len, self.ids))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in self.ids])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in self.ids])
        self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            num_return_sequences=self.copies,
            pad_token_id=pad,
        )


def generation(model: Any, tokenizer: Any, repeats: int, *, continuous: bool = True) -> Table:
    table = Table(title=f"Generation, {NEW_TOKENS} tokens an answer")
    for column in ("prompts x answers", "engine", "tokens/s (range)", "ratio", "first token, ms"):
        table.add_column(column)
    for prompts, copies in ((1, 1), (16, 1), (64, 1), (16, 4)):
        writers = Writers(model, tokenizer, prompts, copies)
        engines = {"transformers.generate": writers.transformers, "this project": writers.ours}
        if continuous and (prompts, copies) == (16, 1):  # on a CPU it takes long
            engines["transformers, continuous batching"] = writers.continuous
        whole = measure({name: lambda w=w: w(NEW_TOKENS) for name, w in engines.items()}, repeats)
        first = measure({name: lambda w=w: w(1) for name, w in engines.items()}, repeats)
        slowest = statistics.median(whole["transformers.generate"])
        for name, seconds in whole.items():
            speeds = sorted(prompts * copies * NEW_TOKENS / s for s in seconds)
            table.add_row(
                f"{prompts} x {copies}",
                name,
                f"{statistics.median(speeds):.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f})",
                f"{slowest / statistics.median(seconds):.2f}",
                f"{1000 * statistics.median(first[name]):.0f}",
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    layout = Layout(Path.cwd())
    if not layout.model("base").is_dir():
        sys.exit("models/base is missing: `dvc repro base` makes it")
    params = load_params(layout.params)
    keep_freed()  # as a stage does; both engines have it
    model, tokenizer = load_policy(layout.model("base"), params.run)
    Console().print(generation(model, tokenizer, options.repeats))


if __name__ == "__main__":
    main()

"""How fast generation and training are, beside transformers' own generation and the machine's ceiling.

All in one run, alternating, since only ratios mean anything on a shared machine. Needs models/base.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.endless import EndlessTokenizer
from rlhf_core.config import SamplingConfig, load_params
from rlhf_core.generation import generate
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt, make_batch
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.roles import AdapterRoles

QUESTIONS = (
    "How are you today?",
    "What do you like to do on weekends?",
    "Do you have any pets?",
    "Tell me a story.",
)
NEW_TOKENS = 32


def matrix_ceiling(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of a large square matrix product."""
    a = torch.randn(size, size, dtype=dtype, device=device)
    a @ a
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * size**3 / (time.perf_counter() - started)


def measure(cases: dict[str, Callable[[], int]], repeats: int) -> dict[str, tuple[float, float, int]]:
    """Median and spread of the seconds of each case, alternating; and its count of tokens."""
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    tokens: dict[str, int] = {}
    for _ in range(repeats):
        for name, case in cases.items():
            started = time.perf_counter()
            tokens[name] = case()
            seconds[name].append(time.perf_counter() - started)
    return {n: (statistics.median(s), max(s) - min(s), tokens[n]) for n, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    layout = Layout(Path.cwd())
    if not layout.model("base").is_dir():
        sys.exit("models/base is missing: `dvc repro base` makes it")
    params = load_params(layout.params)
    model, tokenizer = load_policy(layout.model("base"), params.run)
    chats = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(options.batch)]
    # EOS can stop neither engine, so that both make the same number of tokens.
    model.generation_config.eos_token_id = None
    endless = EndlessTokenizer(tokenizer)
    sampling = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS, seed=0)
    prompts = [encode_prompt(tokenizer, messages) for messages in chats]

    def ours() -> int:
        generate(model, endless, chats, sampling, batch_size=options.batch)
        return options.batch * NEW_TOKENS

    def transformers_generate() -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        return options.batch * NEW_TOKENS

    found = measure(
        {"generate (this project)": ours, "generate (transformers)": transformers_generate}, options.repeats
    )
    roles = AdapterRoles(model, tokenizer, params.model.lora)
    roles.add("policy", seed=0)
    batch = make_batch(prompts, [[5] * NEW_TOKENS] * options.batch, tokenizer.pad_token_id, model.device)

    def forward() -> int:
        with torch.no_grad():
            roles.hidden("policy", *batch.inputs)
        return batch.input_ids.numel()

    def forward_backward() -> int:
        roles.hidden("policy", *batch.inputs).float().sum().backward()
        return batch.input_ids.numel()

    found |= measure(
        {"trunk forward (LoRA)": forward, "trunk forward + backward": forward_backward}, options.repeats
    )
    show(found, matrix_ceiling(model.dtype, model.device), model, options)


def show(
    found: dict[str, tuple[float, float, int]], ceiling: float, model: torch.nn.Module, options: object
) -> None:
    trunk = sum(
        p.numel() for n, p in model.base_model.named_parameters() if "embed" not in n and "lora" not in n
    )
    passes = {"trunk forward (LoRA)": 1, "trunk forward + backward": 2}
    table = Table(title=f"Speed, {options}; matrix ceiling {ceiling / 1e9:.0f} GFLOP/s")
    for column in ("case", "seconds", "spread", "tokens/s", "share of ceiling"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, (median, spread, tokens) in found.items():
        share = passes.get(name, 0) * 2 * trunk * tokens / median / ceiling
        table.add_row(
            name, f"{median:.2f}", f"{spread:.2f}", f"{tokens / median:.0f}", f"{share:.0%}" if share else ""
        )
    Console().print(table)


if __name__ == "__main__":
    main()

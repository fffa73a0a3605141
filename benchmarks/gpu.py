"""PPO and generation on a GPU, with random weights of a usual shape: `rlhf bench gpu`.

Needs no data and no download. PPO runs in a process of its own, so that its peak of memory is its own; full
fine-tuning of 1.5B wants some 60 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers import Case, run
from benchmarks.speed import QUESTIONS, generation, matrix_ceiling
from rlhf_core.config import load_params
from rlhf_core.modeling.loading import load_policy, resolve_device, resolve_dtype

SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {  # of Qwen2.5-1.5B, as a Llama
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "tiny": {  # to see that the command works, on a CPU too
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


def random_model(shape: str, directory: Path) -> Path:
    """A saved Llama of that shape in the computing type, and a small tokenizer, whose tokens it all knows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_core.modeling.scratch import make_scratch_tokenizer

    run = load_params(Path("params.yaml")).run
    tokenizer = make_scratch_tokenizer(QUESTIONS, vocab_size=320)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    device = resolve_device(run)
    with device:
        model = LlamaForCausalLM(config)
    model.to(resolve_dtype(run, device)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def ppo(model: Path, scratch: Path, options: argparse.Namespace) -> Table:
    table = Table(title=f"PPO, {options.episodes} episodes, answers of {options.tokens} tokens")
    for column in (
        "fine-tuning",
        "seconds a batch (range)",
        "tokens/s",
        "share of ceiling",
        "peak GiB",
        "phases",
    ):
        table.add_column(column)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    settings = load_params(Path("params.yaml")).run
    device = resolve_device(settings)
    ceiling = matrix_ceiling(resolve_dtype(settings, device), device)
    for lora in (True, False):
        if options.only not in (None, "lora" if lora else "full"):
            continue
        case = Case("random", options.episodes, options.tokens, 1, 1, False, lora, True)
        facts = {"model": str(model), "batches": options.batches, "conversations": chats}
        path = scratch / "case.json"
        path.write_text(json.dumps(vars(case) | facts))
        found = run(Path(sys.executable), "our_ppo", path)
        seconds = sorted(found["seconds"])
        middle = statistics.median(seconds)
        table.add_row(
            "LoRA" if lora else "full",
            f"{middle:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})",
            f"{statistics.mean(found['tokens']) / middle:.0f}",
            f"{found['flops'] / middle / ceiling:.0%}",
            f"{found['peak_gib']:.1f}",
            ", ".join(f"{name} {spent:.2f}" for name, spent in found["phases"].items()),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--only", choices=("lora", "full"), help="of the two ways to fine-tune")
    parser.add_argument("--episodes", type=int, default=64, help="of a batch, which is one micro-batch too")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--batches", type=int, default=3, help="measured, after one to warm up")
    parser.add_argument("--repeats", type=int, default=3, help="of generation")
    options = parser.parse_args()
    if options.shape != "tiny" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; --shape tiny runs anywhere")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    Console().print(
        f"{name}, torch {torch.__version__}, a Llama of shape {options.shape} with random weights"
    )
    with tempfile.TemporaryDirectory() as scratch:
        directory = random_model(options.shape, Path(scratch) / "model")
        Console().print(ppo(directory, Path(scratch), options))
        model, tokenizer = load_policy(directory, load_params(Path("params.yaml")).run)
        Console().print(generation(model, tokenizer, options.repeats, continuous=model.device.type != "cpu"))


if __name__ == "__main__":
    main()

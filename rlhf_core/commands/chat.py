"""`rlhf chat`: talk to a stage's model or a registered version in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf_core.config import SamplingConfig
    from rlhf_core.layout import Layout

NAMES = ("base", "pretrained", "sft", "policy")
HELP = "/reset starts anew, /seed N sets the seed, /quit or Ctrl-D ends; Ctrl-C stops an answer."


def chat(
    model: Annotated[
        str, typer.Option(help="base, sft, policy, a directory, or models:/rlhf-policy@candidate.")
    ] = "policy",
    compare: Annotated[bool, typer.Option(help="Answers of SFT and of the model side by side.")] = False,
    message: Annotated[
        str, typer.Option("--message", "-m", help="One message, then end; - reads it from stdin.")
    ] = "",
    temperature: Annotated[float, typer.Option(help="Logits are divided by it.", min=0.01)] = 0.7,
    top_k: Annotated[int, typer.Option(help="0 = off.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="1 = off.", min=0.01, max=1.0)] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Talk to a model, with streaming."""
    from rich.console import Console

    from rlhf_core.config import SamplingConfig
    from rlhf_core.layout import Layout

    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
    )
    layout = Layout.here()
    names = ["sft", model] if compare else [model]
    speakers = [open_speaker(name, layout) for name in names]
    console = Console()
    if message or not sys.stdin.isatty():
        text = message if message not in ("", "-") else sys.stdin.read().strip()
        answer(console, speakers, text, sampling)
        return
    console.print(f"[dim]{HELP}[/dim]")
    converse(console, speakers, sampling)


@dataclass
class Speaker:
    """A loaded model and its side of the conversation."""

    name: str
    model: Any
    tokenizer: Any
    messages: list[dict[str, str]] = field(default_factory=list)


def open_speaker(name: str, layout: Layout) -> Speaker:
    from rlhf_core.config import load_params
    from rlhf_core.modeling.loading import load_policy

    run = load_params(layout.params).run
    return Speaker(name, *load_policy(find_model(name, layout), run))


def find_model(name: str, layout: Layout) -> Path:
    """The directory of a stage's model, of a registered version, or `name` itself as a path.

    Raises InputError that says how to make it when it is not there.
    """
    from rlhf_core.errors import InputError

    if name.startswith("models:/"):
        from rlhf_core.mlflow_writer import registered_model_dir

        return registered_model_dir(name, layout.root)
    path = layout.model(name) if name in NAMES else Path(name)
    if not path.is_dir():
        stage = {"pretrained": "pretrain", "policy": "ppo"}.get(name, name)
        how = (
            f"`rlhf run` makes it (stage {stage})"
            if name in NAMES
            else f"name one of {', '.join(NAMES)} or a directory"
        )
        raise InputError(f"--model {name}: there is no {path}; {how}")
    return path


def converse(console: Console, speakers: list[Speaker], sampling: SamplingConfig) -> None:
    """Read, answer, repeat, until the input ends."""
    while True:
        try:
            text = console.input("[bold green]you>[/bold green] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            for speaker in speakers:
                speaker.messages.clear()
        elif text.startswith("/seed"):
            value = text.removeprefix("/seed").strip()
            if value.isdigit():
                sampling = sampling.model_copy(update={"seed": int(value)})
            else:
                console.print("/seed needs a whole number")
        elif text:
            answer(console, speakers, text, sampling)


def answer(console: Console, speakers: list[Speaker], text: str, sampling: SamplingConfig) -> None:
    """Every speaker's reply to `text`, as it is made; Ctrl-C keeps what there is."""
    for speaker in speakers:
        speaker.messages.append({"role": "user", "content": text})
    if len(speakers) == 1:
        _stream_one(console, speakers[0], sampling)
    else:
        _stream_side_by_side(console, speakers, sampling)


def _stream_one(console: Console, speaker: Speaker, sampling: SamplingConfig) -> None:
    from rlhf_core.generation import stream

    reply = ""
    try:
        for piece in stream(speaker.model, speaker.tokenizer, speaker.messages, sampling):
            reply += piece
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        pass
    console.print()
    speaker.messages.append({"role": "assistant", "content": reply.strip()})


def _stream_side_by_side(console: Console, speakers: list[Speaker], sampling: SamplingConfig) -> None:
    from rich.columns import Columns
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    from rlhf_core.generation import stream

    replies = {speaker.name: "" for speaker in speakers}

    def view() -> Columns:
        width = max(20, console.width // len(speakers) - 2)
        panels = [Panel(Text(replies[s.name].strip()), title=s.name, width=width) for s in speakers]
        return Columns(panels, padding=(0, 1))

    with Live(view(), console=console, refresh_per_second=12) as live:
        try:
            for speaker in speakers:
                for piece in stream(speaker.model, speaker.tokenizer, speaker.messages, sampling):
                    replies[speaker.name] += piece
                    live.update(view())
        except KeyboardInterrupt:
            pass
    for speaker in speakers:
        speaker.messages.append({"role": "assistant", "content": replies[speaker.name].strip()})

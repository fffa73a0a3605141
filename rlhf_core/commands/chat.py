"""`rlhf chat`: talk to a stage's model or a registered version in the terminal.

The same seed, model and conversation give the same answer. Conversations are not kept.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rlhf_core.config import RunConfig, SamplingConfig
    from rlhf_core.layout import Layout

NAMES = ("base", "pretrained", "sft", "policy")
MAKERS = {"pretrained": "pretrain", "policy": "ppo"}  # stages that are not named like their model
LABELS = {"sft": "SFT"}
HELP = "/reset starts anew, /seed N sets the seed, /quit or Ctrl-D ends; Ctrl-C stops an answer."
# What a model writes must not move the cursor or set colours: all control characters but tab and line end.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), 127, *range(128, 160)])


def chat(
    model: Annotated[
        str,
        typer.Option(help="base, pretrained, sft, policy, a directory, or models:/rlhf-policy@candidate."),
    ] = "policy",
    compare: Annotated[bool, typer.Option(help="Answers of SFT and of the model side by side.")] = False,
    message: Annotated[
        str, typer.Option("--message", "-m", help="One message, then end; - reads it from stdin.")
    ] = "",
    temperature: Annotated[float, typer.Option(help="Logits are divided by it.", min=0.01)] = 0.7,
    top_k: Annotated[int, typer.Option(help="0 = off: only the k likeliest tokens.", min=0)] = 0,
    top_p: Annotated[
        float, typer.Option(help="1 = off: only the likeliest tokens that hold this much.", min=0.01, max=1.0)
    ] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Another seed, another answer.", min=0)] = 0,
) -> None:
    """Talk to a model, with streaming; or ask one thing with -m or through a pipe."""
    from rich.console import Console

    from rlhf_core.config import SamplingConfig
    from rlhf_core.errors import InputError
    from rlhf_core.layout import Layout

    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
    )
    if compare and model == "sft":
        raise InputError("--compare sets SFT beside another model: name that with --model")
    layout = Layout.here()
    paths = {name: find_model(name, layout) for name in (["sft", model] if compare else [model])}
    text = _one_message(message)
    speakers = [open_speaker(name, path, layout) for name, path in paths.items()]
    console = Console()
    if text is not None:
        answer(console, speakers, text, sampling)
        return
    console.print(f"{' and '.join(speaker.label for speaker in speakers)}. {HELP}", style="dim", markup=False)
    converse(console, speakers, sampling)


def _one_message(message: str) -> str | None:
    """The only message, from the option or a pipe; None for a conversation."""
    from rlhf_core.errors import InputError

    if message and message != "-":
        return message
    if not message and sys.stdin.isatty():
        return None
    text = sys.stdin.read().strip()
    if not text:
        raise InputError("no message: stdin is empty; give one with -m or through a pipe")
    return text


@dataclass
class Speaker:
    """A loaded model and its side of the conversation."""

    name: str
    model: Any
    tokenizer: Any
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name)

    def stream(self, sampling: SamplingConfig) -> Iterator[str]:
        from rlhf_core.generation import stream

        for piece in stream(self.model, self.tokenizer, self.messages, sampling):
            yield piece.translate(CONTROLS)


def open_speaker(name: str, path: Path, layout: Layout) -> Speaker:
    from rlhf_core.modeling.loading import load_policy

    return Speaker(name, *load_policy(path, _run_config(layout)))


def _run_config(layout: Layout) -> RunConfig:
    """Section `run` of the workspace; a directory can be talked to from anywhere, so there may be none."""
    from rlhf_core.config import RunConfig, load_params

    if layout.params.is_file():
        return load_params(layout.params).run
    return RunConfig.alone()


def find_model(name: str, layout: Layout) -> Path:
    """The directory of a stage's model, of a registered version, or `name` itself as a path.

    Raises InputError that says how to make it when it is not there.
    """
    from rlhf_core.errors import InputError

    if name.startswith("models:/"):
        from rlhf_core.mlflow_writer import registered_model_dir

        return registered_model_dir(name, layout.root)
    path = layout.model(name) if name in NAMES else Path(name)
    if path.is_dir():
        return path
    if name in NAMES:
        how = f"make it with `rlhf run` (stage {MAKERS.get(name, name)})"
    else:
        how = f"give {', '.join(NAMES)}, a directory, or models:/NAME@ALIAS"
    raise InputError(f"--model {name}: there is no {path}; {how}")


def converse(console: Console, speakers: Sequence[Speaker], sampling: SamplingConfig) -> None:
    """Read, answer, repeat, until the input ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and a history at the prompt
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            for speaker in speakers:
                speaker.messages.clear()
        elif text.startswith("/"):
            sampling = _set_seed(console, text, sampling)
        elif text:
            answer(console, speakers, text, sampling)


def _set_seed(console: Console, text: str, sampling: SamplingConfig) -> SamplingConfig:
    command, _, value = text.partition(" ")
    if command == "/seed" and value.strip().isascii() and value.strip().isdigit():
        return sampling.model_copy(update={"seed": int(value)})
    told = (
        "/seed needs a whole number, such as /seed 7" if command == "/seed" else f"unknown {command}: {HELP}"
    )
    console.print(told, style="yellow", markup=False)
    return sampling


def answer(console: Console, speakers: Sequence[Speaker], text: str, sampling: SamplingConfig) -> None:
    """Every speaker's reply to `text`, as it is made; Ctrl-C keeps what there is."""
    for speaker in speakers:
        speaker.messages.append({"role": "user", "content": text})
    show = _stream_one if len(speakers) == 1 else _stream_side_by_side
    replies = show(console, speakers, sampling)
    for speaker, reply in zip(speakers, replies, strict=True):
        speaker.messages.append({"role": "assistant", "content": reply.strip()})


def _stream_one(console: Console, speakers: Sequence[Speaker], sampling: SamplingConfig) -> list[str]:
    (speaker,) = speakers
    reply = ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in speaker.stream(sampling):
            reply += piece
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return [reply]


def _stream_side_by_side(
    console: Console, speakers: Sequence[Speaker], sampling: SamplingConfig
) -> list[str]:
    from rich.live import Live

    replies = [""] * len(speakers)
    with (
        Live(_columns(speakers, replies), console=console, refresh_per_second=12) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for i, piece in _in_turn([speaker.stream(sampling) for speaker in speakers]):
            replies[i] += piece
            live.update(_columns(speakers, replies))
    return replies


def _in_turn(streams: Sequence[Iterator[str]]) -> Iterator[tuple[int, str]]:
    """A piece of each stream in turn, with the stream's number, until all have ended."""
    live = dict(enumerate(streams))
    while live:
        for i, stream in list(live.items()):
            try:
                yield i, next(stream)
            except StopIteration:
                del live[i]


def _columns(speakers: Sequence[Speaker], replies: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    for speaker in speakers:
        table.add_column(Text(speaker.label), ratio=1, overflow="fold")
    table.add_row(*(Text(reply.strip()) for reply in replies))
    return table

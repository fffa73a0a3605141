import os
import pty
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from rlhf_core.commands import chat as chat_module
from rlhf_core.commands.chat import Speaker, answer, chat, find_model
from rlhf_core.config import SamplingConfig
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout

SAMPLING = SamplingConfig(temperature=0.7, top_k=0, top_p=0.95, max_new_tokens=12, seed=0)


@pytest.fixture
def app():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(chat)
    return app


@pytest.fixture
def workspace(tmp_path, tiny_model_dir, monkeypatch):
    """A workspace with an SFT model and a policy, and no params.yaml."""
    (tmp_path / "models").mkdir()
    for name in ("sft", "policy"):
        os.symlink(tiny_model_dir, tmp_path / "models" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(app, *options, stdin=None):
    result = CliRunner().invoke(app, ["--max-new-tokens", "12", *options], input=stdin)
    if result.exception:
        raise result.exception
    return result.output


def test_one_message_is_answered_and_repeats(app, workspace, tiny_model_dir):
    hot = ["-m", "hello", "--temperature", "5"]  # cold, the untrained model repeats one token
    first = ask(app, *hot)
    assert first.strip()
    assert ask(app, *hot) == first
    assert ask(app, *hot, "--model", str(tiny_model_dir)) == first
    assert ask(app, *hot, "--seed", "1") != first


def test_message_comes_through_a_pipe(app, workspace):
    assert ask(app, stdin="hello\n") == ask(app, "-m", "-", stdin="hello") == ask(app, "-m", "hello")


def test_empty_pipe_is_told(app, workspace):
    with pytest.raises(InputError, match="no message"):
        ask(app, stdin=" \n")


def test_compare_shows_both_models(app, workspace):
    shown = ask(app, "-m", "hello", "--compare")
    header = next(line for line in shown.splitlines() if "SFT" in line)
    assert "policy" in header


def test_compare_needs_two_models(app, workspace):
    with pytest.raises(InputError, match="beside another model"):
        ask(app, "-m", "hello", "--compare", "--model", "sft")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base", r"no .*models/base; make it with `rlhf run` \(stage base\)"),
        ("pretrained", r"stage pretrain\)"),
        ("polcy", "give base, pretrained, sft, policy, a directory"),
    ],
)
def test_missing_model_says_how_to_make_it(app, workspace, name, message):
    with pytest.raises(InputError, match=message):
        find_model(name, Layout(workspace))
    with pytest.raises(InputError):
        ask(app, "-m", "hello", "--model", name)


def scripted(pieces):
    """A speaker that says `pieces`; an exception among them is raised."""

    def stream(sampling):
        for piece in pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece.translate(chat_module.CONTROLS)

    speaker = Speaker("policy", None, None)
    speaker.stream = stream
    return speaker


def shown_by(speakers, text="hi"):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    answer(console, speakers, text, SAMPLING)
    return console.file.getvalue()


def test_ctrl_c_keeps_the_half_answer():
    speaker = scripted(["I ", "like", KeyboardInterrupt()])
    assert shown_by([speaker]) == "I like\n"
    assert speaker.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I like"}]


def test_ctrl_c_in_a_comparison_keeps_both_halves():
    one, two = scripted(["a", "b", "c"]), scripted(["x", KeyboardInterrupt()])
    shown_by([one, two])
    assert [speaker.messages[-1]["content"] for speaker in (one, two)] == ["ab", "x"]


def test_the_shorter_answer_waits_for_the_longer():
    one, two = scripted(["a", "b", "c"]), scripted(["x"])
    shown_by([one, two])
    assert [speaker.messages[-1]["content"] for speaker in (one, two)] == ["abc", "x"]


def test_answers_cannot_steer_the_terminal():
    shown = shown_by([scripted(["[red]a\x1b[2J", "\x07b\n", "\x9bc"])])
    assert shown == "[red]a[2Jb\nc\n"


def test_conversation_grows_and_resets(workspace, monkeypatch):
    heard = []

    def fake_stream(model, tokenizer, messages, sampling):
        heard.append(([m["content"] for m in messages], sampling.seed))
        yield "fine"

    monkeypatch.setattr("rlhf_core.generation.stream", fake_stream)
    lines = iter(["hello", "", "how?", "/seed x", "/seed 7", "/what", "/reset", "again", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    printed = []
    console = SimpleNamespace(print=lambda *args, **options: printed.append(args))
    chat_module.converse(console, [Speaker("policy", None, None)], SAMPLING)
    assert heard == [(["hello"], 0), (["hello", "fine", "how?"], 0), (["again"], 7)]
    assert next(lines) == "never"
    told = " ".join(str(args[0]) for args in printed if args)
    assert "/seed needs a whole number" in told
    assert "unknown /what" in told


def read_until(fd, text, seconds=60):
    seen, end = "", time.monotonic() + seconds
    while text not in seen and time.monotonic() < end:
        if select.select([fd], [], [], 0.2)[0]:
            try:
                seen += os.read(fd, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                break
    return seen


ENDLESS = """
import itertools, time, typer
import rlhf_core.generation
from rlhf_core.commands import chat

def endless(model, tokenizer, messages, sampling):
    for i in itertools.count():
        time.sleep(0.02)
        yield f"word{i} "

rlhf_core.generation.stream = endless
chat.open_speaker = lambda name, path, layout: chat.Speaker(name, None, None)
app = typer.Typer()
app.command()(chat.chat)
app()
"""


@pytest.mark.parametrize("options", [[], ["--compare"]])
def test_conversation_in_a_real_terminal(workspace, options):
    """Ctrl-C stops an answer that would never end, without ending the program; Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, *options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        assert "you>" in read_until(ours, "you> ")
        os.write(ours, b"hello\n")
        assert "word5" in read_until(ours, "word5")
        process.send_signal(signal.SIGINT)
        assert "you>" in read_until(ours, "you> ")
        assert process.poll() is None
        os.write(ours, b"\x04")
        read_until(ours, "the end of what it prints", seconds=5)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(ours)

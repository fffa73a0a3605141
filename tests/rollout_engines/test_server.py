"""The server's life: found, waited for, ended with the stage, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from rlhf_core.config import VLLMConfig
from rlhf_core.errors import InputError
from rlhf_core.rollout_engines.server import RolloutEngineError, find_program, serving

OPTIONS = [
    "--enable-lora",
    "--served-model-name=sft",
    "--max-model-len=9",
    "--max-num-seqs=4",
    "--gpu-memory-utilization=0.3",
    "--max-lora-rank=8",
    "--max-loras=1",
    "--logprobs-mode=processed_logprobs",
    "--generation-config=vllm",
    "--seed=0",
]


def config(program, seconds=60.0):
    return VLLMConfig(program=str(program), memory_share=0.3, start_seconds=seconds, rollout_seconds=60.0)


def is_gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_missing_program_is_named_with_its_key():
    with pytest.raises(InputError, match=r"ppo\.vllm\.program = '/none/vllm': no such program; pip install"):
        find_program(config("/none/vllm"))


def test_the_server_answers_inside_of_the_block_and_is_gone_after_it(make_fake, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("WORLD_SIZE", "1")
    fake, said = make_fake(), []
    fake.behave("light")
    with serving(config(fake.program), tmp_path, OPTIONS, tmp_path / "vllm.log", said.append) as server:
        with open(f"/proc/{server.process.pid}/environ", "rb") as file:
            environment = dict(entry.split(b"=", 1) for entry in file.read().split(b"\0") if entry)
        assert server.process.poll() is None
    assert is_gone(server.process.pid)
    assert "its log is" in said[0]
    assert said[1].startswith("vLLM answers")
    assert environment[b"VLLM_NO_USAGE_STATS"] == environment[b"DO_NOT_TRACK"] == b"1"
    assert environment[b"HF_HUB_OFFLINE"] == b"1"
    assert environment[b"VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == b"True"
    assert not {b"PYTHONPATH", b"WORLD_SIZE"} & environment.keys()


def test_a_server_that_ends_at_once_shows_what_it_said(make_fake, tmp_path):
    fake = make_fake()
    fake.behave("does_not_start")
    message = r"(?s)did not come up; it has ended with status 1.*vllm\.log.*No available memory for the cache"
    with (
        pytest.raises(RolloutEngineError, match=message),
        serving(config(fake.program), tmp_path, OPTIONS, tmp_path / "vllm.log", print),
    ):
        pass


def test_a_server_that_never_answers_is_given_up(make_fake, tmp_path):
    fake = make_fake()
    fake.behave("never_answers")
    with (
        pytest.raises(RolloutEngineError, match=r"ppo\.vllm\.start_seconds = 0\.5"),
        serving(config(fake.program, 0.5), tmp_path, OPTIONS, tmp_path / "vllm.log", print),
    ):
        pass


def test_the_server_ends_with_a_stage_that_is_killed(make_fake, tmp_path):
    fake = make_fake()
    fake.behave("light")
    code = f"""
        import time
        from pathlib import Path
        from rlhf_core.config import VLLMConfig
        from rlhf_core.rollout_engines.server import serving
        config = VLLMConfig(
            program={str(fake.program)!r}, memory_share=0.3, start_seconds=60.0, rollout_seconds=60.0
        )
        here = Path({str(tmp_path)!r})
        with serving(config, here, {OPTIONS!r}, here / "vllm.log", lambda text: None) as server:
            print(server.process.pid, flush=True)
            time.sleep(60)
    """
    stage = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    server = int(stage.stdout.readline())
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    stage.stdout.close()
    assert is_gone(server)

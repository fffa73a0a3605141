"""Rollouts by vLLM, through a program that speaks as it does; and by itself where RLHF_TEST_VLLM names it."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from rlhf_core.config import ScratchConfig, parse_params
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.roles import adapter_roles
from rlhf_core.modeling.scratch import make_scratch_model, make_scratch_tokenizer
from rlhf_core.rl.rollout import Actors
from rlhf_core.rollout_engines import vllm
from rlhf_core.rollout_engines.engine import OwnEngine
from rlhf_core.rollout_engines.server import RolloutEngineError
from rlhf_core.stages import ppo
from rlhf_core.stages.runner import run_stage
from tests.conftest import TEXTS
from tests.stages.toy import assert_same_outputs, make_workspace, run_broken_off

CHATS = [[{"role": "user", "content": text}] for text in ("hello", "how are you today my friend?", "no")]
REAL = os.environ.get("RLHF_TEST_VLLM", "")


def by_vllm(params, program, **changes):
    tree = params.model_dump(mode="json", by_alias=True)
    tree["ppo"] |= {"rollout_engine": "vllm"}
    tree["ppo"]["vllm"] |= {"program": str(program)} | changes
    return parse_params(tree, "test")


@pytest.fixture(scope="module")
def place(make_fake, tiny_model_dir, tmp_path_factory):
    """A running server with an engine and an adapter that changes much."""
    from rlhf_core.config import read_yaml
    from tests.conftest import ROOT

    fake, layout = make_fake(), Layout(tmp_path_factory.mktemp("place"))
    shutil.copytree(tiny_model_dir, layout.model("sft"))
    tree = read_yaml(ROOT / "params.yaml")
    tree["run"] |= {"device": "cpu", "precision": "float32"}
    tree["ppo"]["sampling"] |= {"max_new_tokens": 8}
    params = by_vllm(parse_params(tree, "test"), fake.program)
    model, tokenizer = load_policy(layout.model("sft"), params.run)
    roles = adapter_roles(model, tokenizer, params)
    roles.add("policy", seed=0)
    shake(roles, 1)
    with vllm.opened(params, layout, CHATS, print) as engine:
        yield SimpleNamespace(
            fake=fake, layout=layout, params=params, roles=roles, engine=engine, sampling=params.ppo.sampling
        )


def history_of(layout):
    return [json.loads(line) for line in (layout.run_dir("ppo") / "history.jsonl").read_text().splitlines()]


def shake(roles, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in roles.parameters("policy"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def asking(place):
    place.fake.behave("")
    place.fake.mode_file.with_suffix(".asked").unlink(missing_ok=True)

    def ask(**changes):
        sampling = place.sampling.model_copy(update=changes)
        return place.engine.answer(place.roles, CHATS, sampling, samples_per_prompt=2, batch_size=4)

    yield ask
    place.fake.behave("")


def test_greedy_answers_are_the_own_engines(place, asking):
    own = OwnEngine().answer(
        place.roles,
        CHATS,
        place.sampling.model_copy(update={"top_k": 1}),
        samples_per_prompt=2,
        batch_size=4,
    )
    found = asking(top_k=1)
    assert [[(a.text, a.token_ids, a.finished) for a in group] for group in found] == [
        [(a.text, a.token_ids, a.finished) for a in group] for group in own
    ]


def test_an_answer_ends_with_eos_exactly_when_it_is_finished(place, asking):
    eos = place.roles.tokenizer.eos_token_id
    answers = [a for seed in range(6) for group in asking(seed=seed, temperature=2.0) for a in group]
    assert {a.finished for a in answers} == {True, False}
    for answer in answers:
        assert answer.finished == (answer.token_ids[-1] == eos)
        assert eos not in answer.token_ids[:-1]
        assert len(answer.logprobs) == len(answer.token_ids)
        assert answer.finished or len(answer.token_ids) == 8


def test_logprobs_are_the_trainers_at_the_temperature(place, asking):
    from rlhf_core.modeling.encoding import encode_prompt, make_batch

    answers = [a for group in asking() for a in group]
    tokenizer = place.roles.tokenizer
    prompts = [encode_prompt(tokenizer, messages) for messages in CHATS for _ in range(2)]
    batch = make_batch(
        prompts, [list(a.token_ids) for a in answers], tokenizer.pad_token_id, place.roles.device
    )
    with torch.no_grad():
        logprobs, _ = Actors(place.roles, None, None).logprobs("policy", batch, place.sampling.temperature)
    drawn = torch.tensor([x for answer in answers for x in answer.logprobs])
    # Another kernel of attention, and rows with and without padding: some units of float32's last place.
    torch.testing.assert_close(logprobs[batch.response_mask], drawn, rtol=1e-4, atol=1e-4)


def test_each_rollout_is_asked_of_the_policy_as_it_is_then(place, asking):
    before = asking(top_k=1)
    shake(place.roles, 2)
    after = asking(top_k=1)
    shake(place.roles, 1)
    assert asking(top_k=1) == before != after
    names = [body["lora_name"] for body in place.fake.asked("/v1/load_lora_adapter")]
    assert len(set(names)) == 3
    last = place.layout.run_dir("ppo") / "vllm"
    assert [path.name for path in last.iterdir()] == names[-1:]


def test_randomness_belongs_to_the_row(place, asking):
    whole = asking()
    part = place.engine.answer(
        place.roles, CHATS, place.sampling, samples_per_prompt=2, batch_size=4, only=[2]
    )
    assert part == [whole[2]]
    assert asking(seed=7) != whole
    seeds = [body["seed"] for body in place.fake.asked("/v1/completions")]
    assert len(set(seeds[:6])) == 6  # they arrive in any order
    assert set(seeds[6:8]) < set(seeds[:6])
    assert len(set(seeds)) == 12
    assert vllm.row_seeds(3, 5) == vllm.row_seeds(9, 5)[:3]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("load_refused", "/v1/load_lora_adapter gave status 400: .*greater than max_lora_rank"),
        ("refused", "/v1/completions gave status 400: .*maximum context length"),
        ("too_few", r"that do not end at the first EOS \(\d+\) or at 8"),
        ("past_eos", "that do not end at the first EOS"),
        ("one_logprob_short", r"gave \d log-probabilities for \d tokens"),
        ("no_logprobs", r"a completion whose choices\.0\.logprobs is wrong"),
    ],
)
def test_what_cannot_be_used_is_told_with_the_end_of_the_log(place, asking, mode, message):
    place.fake.behave(mode)
    with pytest.raises(RolloutEngineError, match=message) as raised:
        asking()
    assert "vllm.log:\n" in str(raised.value)
    assert str(raised.value).endswith("listening")


def test_a_server_that_is_late_or_dies_is_told(make_fake, place):
    fake = make_fake()
    params = by_vllm(place.params, fake.program, rollout_seconds=1.5)
    with vllm.opened(params, place.layout, CHATS, print) as engine:

        def ask():
            engine.answer(place.roles, CHATS, place.sampling, samples_per_prompt=1, batch_size=4)

        fake.behave("silent")
        with pytest.raises(RolloutEngineError, match=r"more than ppo\.vllm\.rollout_seconds = 1\.5"):
            ask()
    fake.behave("")
    with vllm.opened(by_vllm(place.params, fake.program), place.layout, CHATS, print) as engine:
        fake.behave("dies")
        with pytest.raises(RolloutEngineError, match=r"(?s)ended with status 9.*CUDA error: out of memory"):
            ask()


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("model.finetuning", "full", "must be lora"),
        ("run.num_processes", 2, "must be 1"),
        ("run.sharding", "weights", "must be none"),
        ("model.lora.rank", 513, "must not exceed 512"),
        ("ppo.vllm.memory_share", 1.0, "less than 1"),
    ],
)
def test_what_it_cannot_do_is_refused_by_key(small_params, key, value, rule):
    tree = by_vllm(small_params, "vllm").model_dump(mode="json", by_alias=True)
    *parents, leaf = key.split(".")
    part = tree
    for name in parents:
        part = part[name]
    part[leaf] = value
    with pytest.raises(InputError, match=rf"{key}.*{value}.*{rule}"):
        parse_params(tree, "test")


def test_ranks_of_another_launcher_and_a_missing_program_are_refused(small_params, monkeypatch):
    params = by_vllm(small_params, "/none/vllm")
    with pytest.raises(InputError, match="no such program"):
        vllm.check(params)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"ppo\.rollout_engine = 'vllm': it answers one process"):
        vllm.check(params)


def test_a_stage_resumes_to_the_same_weights(make_fake, tmp_path, tiny_model_dir, small_params, monkeypatch):
    monkeypatch.setenv("RLHF_TRACKING", "off")
    one, other = (make_workspace(tmp_path / name, tiny_model_dir) for name in ("whole", "broken"))
    run_stage("reward", small_params, one)
    shutil.copytree(one.model("reward"), other.model("reward"))
    params = by_vllm(small_params, make_fake().program)
    run_stage("ppo", params, one)
    gaps = [row["rollout/logprob_gap"] for row in history_of(one)[:-1]]
    assert len(gaps) == params.ppo.num_updates
    assert max(gaps) < 1e-4
    assert not (one.run_dir("ppo") / "vllm").exists()
    run_broken_off(monkeypatch, ppo.Training, "gold_metrics", 2, lambda: run_stage("ppo", params, other))
    run_stage("ppo", params, other)
    assert_same_outputs(one, other, "ppo", "policy")


@pytest.mark.skipif(not REAL, reason="RLHF_TEST_VLLM names no program")
def test_a_real_vllm_writes_the_rollouts(tmp_path, small_params, monkeypatch):
    monkeypatch.setenv("RLHF_TRACKING", "off")
    tokenizer = make_scratch_tokenizer(TEXTS, vocab_size=320)
    shape = ScratchConfig(
        vocab_size=320, hidden_size=128, num_layers=2, num_heads=2
    )  # heads as wide as it takes
    model = make_scratch_model(tokenizer, shape, seed=0)
    model.get_input_embeddings().weight.data.mul_(10)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    layout = make_workspace(tmp_path / "place", tmp_path / "tiny")
    run_stage("reward", small_params, layout)
    params = by_vllm(small_params, REAL)

    greedy = params.ppo.sampling.model_copy(update={"top_k": 1, "max_new_tokens": 8})
    roles = adapter_roles(*load_policy(layout.model("sft"), params.run), params)
    roles.add("policy", seed=0)
    shake(roles, 1)
    wishes = dict(samples_per_prompt=2, batch_size=4)
    with vllm.opened(params, layout, CHATS, print) as engine:
        found = engine.answer(roles, CHATS, greedy, **wishes)
    expected = OwnEngine().answer(roles, CHATS, greedy, **wishes)
    assert [[a.token_ids for a in group] for group in found] == [
        [a.token_ids for a in group] for group in expected
    ]

    run_stage("ppo", params, layout)
    history = history_of(layout)
    assert len(history) == params.ppo.num_updates + 1
    assert all(row["rollout/logprob_gap"] < 1e-3 for row in history[:-1])

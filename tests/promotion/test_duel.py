import json
import math

import pytest
import torch

from rlhf_core.errors import InputError
from rlhf_core.json_lines import lines_of
from rlhf_core.modeling.encoding import encode_prompt, encode_response
from rlhf_core.modeling.loading import load_policy
from rlhf_core.promotion.duel import (
    Answering,
    Spec,
    duel,
    fingerprint,
    frozen_demonstrations,
    frozen_prompts,
    outcomes_of,
    read_duel,
)
from rlhf_core.promotion.verdict import decide

from .conftest import NICE
from .prepared import write_prepared
from .test_guardrails import FINE


@pytest.fixture
def spec(tmp_path, tiny_model_dir, nice_model_dir, duel_params):
    data = write_prepared(tmp_path / "prepared")
    return Spec(nice_model_dir, tiny_model_dir, tiny_model_dir, data, duel_params, reward_accuracy=0.7)


def verdict_of(spec, out):
    rows, measurements, _ = read_duel(out)
    return decide(outcomes_of(rows), measurements, spec.params.promotion)


def test_the_better_policy_passes_and_a_repetition_is_the_same_bytes(spec, tmp_path):
    duel(spec, tmp_path / "one")
    verdict = verdict_of(spec, tmp_path / "one")
    assert verdict.outcome == "pass", verdict.reasons
    assert verdict.gate.win_rate > 0.8
    assert verdict.gate.num_prompts == 24
    rows, _, facts = read_duel(tmp_path / "one")
    assert any(NICE in row["candidate"][0]["text"] for row in rows)
    assert facts["prompts_sha256"] == fingerprint(rows)
    duel(spec, tmp_path / "two")
    for name in ("results.jsonl", "measurements.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_policy_against_itself_ties_everywhere_and_fails(spec, tmp_path, tiny_model_dir):
    same = Spec(tiny_model_dir, tiny_model_dir, tiny_model_dir, spec.data, spec.params, 0.7)
    duel(same, tmp_path / "out")
    verdict = verdict_of(same, tmp_path / "out")
    assert (verdict.outcome, verdict.gate.win_rate, verdict.gate.ties) == ("fail", 0.5, 1.0)
    _, measurements, _ = read_duel(tmp_path / "out")
    assert measurements.kl == 0.0
    assert measurements.perplexity == measurements.sft_perplexity
    assert measurements.candidate == measurements.opponent


def test_kl_and_perplexity_agree_with_a_slow_definition(spec):
    answering = Answering(
        spec, [row["messages"] for row in frozen_prompts(spec)], frozen_demonstrations(spec)
    )
    answering.run()
    models = {name: load_policy(getattr(spec, name), spec.params.run) for name in ("candidate", "sft")}

    def logprobs(name, messages, ids, temperature):
        model, tokenizer = models[name]
        prompt = encode_prompt(tokenizer, messages)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(ids)])).logits[0].double() / temperature
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return sum(row[token].item() for row, token in zip(rows, ids))

    temperature = spec.params.promotion.sampling.temperature
    gaps = [
        logprobs("candidate", asked, answer.token_ids, temperature)
        - logprobs("sft", asked, answer.token_ids, temperature)
        for asked, (answer,) in zip(answering.conversations, answering.answers["candidate"])
    ]
    assert answering.kl() == pytest.approx(sum(gaps) / len(gaps), rel=1e-3)
    tokenizer = models["candidate"][1]
    told = [
        (row["messages"], encode_response(tokenizer, row["response"])) for row in answering.demonstrations
    ]
    total = sum(logprobs("candidate", asked, ids, 1.0) for asked, ids in told)
    slow = math.exp(-total / sum(len(ids) for _, ids in told))
    assert answering.perplexities["candidate"] == pytest.approx(slow, rel=1e-3)


def test_frozen_prompts_depend_on_content_and_seed_alone(spec, tmp_path):
    asked = [row["prompt"] for row in frozen_prompts(spec)]
    assert len(set(asked)) == 24
    again = Spec(spec.candidate, spec.opponent, spec.sft, write_prepared(tmp_path / "b"), spec.params, 0.7)
    assert [row["prompt"] for row in frozen_prompts(again)] == asked
    seeded = spec.params.model_copy(update={"run": spec.params.run.model_copy(update={"seed": 1})})
    other = Spec(spec.candidate, spec.opponent, spec.sft, spec.data, seeded, 0.7)
    assert [row["prompt"] for row in frozen_prompts(other)] != asked


def test_what_was_compared_is_read_again_with_any_line_separator(tmp_path):
    rows = [{"prompt": "a\u2028b", "outcomes": []}, {"prompt": "c\x85d", "outcomes": []}]
    (tmp_path / "results.jsonl").write_text(lines_of(rows), encoding="utf-8")
    facts = {"prompts_sha256": "0", "num_demonstrations": 1}
    (tmp_path / "measurements.json").write_text(json.dumps(FINE.as_dict() | facts))
    assert read_duel(tmp_path) == (rows, FINE, facts)


def test_too_few_prompts_and_missing_models_are_told(spec, tmp_path):
    few = Spec(spec.candidate, spec.opponent, spec.sft, write_prepared(tmp_path / "few", 8), spec.params, 0.7)
    with pytest.raises(InputError, match=r"8 held-out prompts, and promotion.min_comparisons \(20\)"):
        duel(few, tmp_path / "out")
    gone = Spec(tmp_path / "gone", spec.opponent, spec.sft, spec.data, spec.params, 0.7)
    with pytest.raises(InputError, match="gone: no such model directory"):
        duel(gone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_samples_are_averaged_by_prompt(spec, tmp_path):
    config = spec.params.promotion.model_copy(update={"samples_per_prompt": 2})
    params = spec.params.model_copy(update={"promotion": config})
    two = Spec(spec.candidate, spec.opponent, spec.sft, spec.data, params, 0.7)
    duel(two, tmp_path / "out")
    rows, _, _ = read_duel(tmp_path / "out")
    assert all(len(row["outcomes"]) == len(row["candidate"]) == 2 for row in rows)
    assert verdict_of(two, tmp_path / "out").gate.num_prompts == 24


def test_a_spec_survives_its_file(spec, tmp_path):
    spec.save(tmp_path / "spec.json")
    assert Spec.load(tmp_path / "spec.json") == spec
    unknown = Spec(spec.candidate, spec.opponent, spec.sft, spec.data, spec.params, math.nan)
    unknown.save(tmp_path / "spec.json")
    json.loads((tmp_path / "spec.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert math.isnan(Spec.load(tmp_path / "spec.json").reward_accuracy)

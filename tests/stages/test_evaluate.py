import csv
import json
import shutil

import pytest
import torch

from rlhf_core.data.rows import write_rows
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt
from rlhf_core.modeling.loading import load_policy, load_tokenizer
from rlhf_core.modeling.reward import Normalisation, ScalarHead, load_reward_model, save_reward_model
from rlhf_core.stages import evaluate
from rlhf_core.tracking import Tracker

TEXTS = [
    "i like the sea",
    "do you like rain?",
    "hello there",
    "good books and long walks",
    "the sun is great",
]


@pytest.fixture
def small(params):
    sampling = params.evaluate.sampling.model_copy(update={"max_new_tokens": 10})
    changes = {"num_prompts": 4, "num_samples": 2, "bootstrap_samples": 200, "sampling": sampling}
    return params.model_copy(
        update={
            "run": params.run.model_copy(update={"device": "cpu", "precision": "float32"}),
            "evaluate": params.evaluate.model_copy(update=changes),
        }
    )


@pytest.fixture
def layout(tmp_path, tiny_model_dir, small):
    layout = Layout(tmp_path)
    shutil.copytree(tiny_model_dir, layout.model("pretrained"))
    shutil.copytree(tiny_model_dir, layout.model("sft"))
    model, tokenizer = load_policy(tiny_model_dir, small.run)
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(1)
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(layout.model("policy"))
    head = ScalarHead(model.config.hidden_size, seed=0)
    layout.model("reward").mkdir()
    save_reward_model(model.model, head, Normalisation(0.5, 2.0), layout.model("reward"), torch.float32)
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(layout.model(name))
    rows = [
        {
            "messages": [{"role": "user", "content": text}],
            "prompt": text,
            "source": "unit.jsonl",
            "row": i + 1,
        }
        for i, text in enumerate(TEXTS)
    ]
    write_rows(layout.prepared_file("prompts", "eval"), rows, "prompts")
    layout.history("ppo").parent.mkdir(parents=True)
    with layout.history("ppo").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["step", "objective/kl", "objective/scores"], [0, 0.0, 0.1], [1, 0.7, 0.2]])
    return layout


def run(params, layout):
    return evaluate.run(params, layout, Tracker("evaluate", layout.run_dir("evaluate")))


def read_samples(layout):
    text = (layout.evaluation / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_evaluate_writes_the_report(small, layout):
    metrics = run(small, layout)
    assert metrics["eval/num_prompts"] == 4
    assert metrics["eval/kl_budget"] == small.ppo.kl_budget
    assert metrics["eval/win_rate_over_sft_low"] <= metrics["eval/win_rate_over_sft"]
    # base and SFT are the same model here and draw the same random numbers, so they give the same answers.
    for name in ("gold", "proxy", "length", "base_perplexity"):
        assert metrics[f"eval/{name}_base"] == metrics[f"eval/{name}_sft"]
    names = {path.name for path in layout.evaluation.iterdir()}
    assert {"results.json", "samples.jsonl", "report.html", "gold.png", "ppo_kl.png"} <= names
    assert "sft_loss.png" not in names  # there is no history of it
    tree = json.loads((layout.evaluation / "results.json").read_text())
    assert tree["comparison"]["kl"]["estimate"] == metrics["eval/kl"]
    samples = read_samples(layout)
    assert len(samples) == 4
    assert all(row["base"] == row["sft"] for row in samples)
    assert any(row["policy"] != row["sft"] for row in samples)


def test_kl_and_scores_agree_with_a_slow_definition(small, layout):
    run(small, layout)
    tokenizer = load_tokenizer(layout.model("sft"))
    models = {name: load_policy(layout.model(name), small.run)[0] for name in ("policy", "sft")}
    temperature = small.evaluate.sampling.temperature
    answering = evaluate.Answering(
        small,
        layout,
        evaluate._choose_prompts(small, layout),
        Tracker("evaluate", layout.run_dir("evaluate")),
    )
    answering.run()
    for row, messages, answer in zip(
        read_samples(layout), answering.conversations, answering.answers["policy"]
    ):
        assert row["prompt"] == messages[0]["content"]
        prompt = encode_prompt(tokenizer, messages)
        ids = torch.tensor([prompt + list(answer.token_ids)])
        total = {}
        for name, model in models.items():
            with torch.no_grad():
                logprobs = (model(ids).logits[0].double() / temperature).log_softmax(-1)
            total[name] = sum(
                logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer.token_ids)
            )
        assert row["kl"] == pytest.approx(total["policy"] - total["sft"], abs=1e-4)
        scorer = load_reward_model(layout.model("reward"), small.run)
        assert row["proxy_policy"] == pytest.approx(scorer.score([messages], [answer.text])[0], abs=1e-4)


def test_evaluate_repeats_itself_byte_for_byte(small, layout):
    metrics = run(small, layout)
    first = {path.name: path.read_bytes() for path in layout.evaluation.iterdir()}
    assert run(small, layout) == metrics
    assert {path.name: path.read_bytes() for path in layout.evaluation.iterdir()} == first
    assert str(layout.root).encode() not in first["report.html"] + first["results.json"]


def test_policy_against_itself_has_no_kl_and_only_ties(small, layout):
    shutil.rmtree(layout.model("policy"))
    shutil.copytree(layout.model("sft"), layout.model("policy"))
    metrics = run(small, layout)
    assert metrics["eval/kl"] == 0.0
    assert metrics["eval/win_rate_over_sft"] == 0.5
    assert metrics["eval/gold_gain_over_sft"] == 0.0


def test_missing_model_is_told_before_any_answer(small, layout):
    shutil.rmtree(layout.model("reward"))
    tracker = Tracker("evaluate", layout.run_dir("evaluate"))
    with pytest.raises(InputError, match=r"models/reward: no such model directory"):
        evaluate.run(small, layout, tracker)
    assert not (layout.run_dir("evaluate") / "progress.json").exists()
    assert not layout.evaluation.exists()


def test_evaluate_needs_prompts(small, layout):
    write_rows(layout.prepared_file("prompts", "eval"), [], "prompts")
    with pytest.raises(InputError, match="no held-out prompts"):
        run(small, layout)


def test_old_report_stays_when_a_new_one_fails(small, layout, monkeypatch):
    run(small, layout)
    before = (layout.evaluation / "results.json").read_bytes()

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "report_html", fail)
    with pytest.raises(KeyboardInterrupt):
        run(small, layout)
    assert (layout.evaluation / "results.json").read_bytes() == before

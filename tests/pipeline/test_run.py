"""The pipeline as a user starts it: the smoke profile through the real flow, DVC, MLflow and registry."""

from __future__ import annotations

import json
import shutil

from rlhf_core.config import load_params
from rlhf_core.mlflow_writer import open_client, registered_model_dir
from rlhf_core.stages import STAGES

from .checkouts import clone_with_cache, commit, make_checkout, run

QUESTION = {"messages": [{"role": "user", "content": "how are you?"}], "max_tokens": 8, "seed": 3}


def test_run_ends_with_models_reports_and_one_table(finished):
    checkout, done = finished
    for name in ("base", "pretrained", "sft", "policy"):
        assert (checkout / "models" / name / "model.safetensors").is_file()
    for stage in STAGES:
        assert json.loads((checkout / "reports" / stage / "metrics.json").read_text())
    for text in (
        "gold reward",
        "win rate",
        "KL to SFT",
        "report.html",
        "What to do next",
        "rlhf-policy@candidate",
    ):
        assert text in done.stdout, text
    pretrain = json.loads((checkout / "reports" / "pretrain" / "metrics.json").read_text())
    assert pretrain["pretrain/eval_loss"] < pretrain["pretrain/eval_loss_before"]
    assert (checkout / "reports" / "evaluation" / "report.html").is_file()
    assert (checkout / "reports" / "validation" / "index.html").is_file()


def test_dvc_finds_nothing_to_do_after_the_flow(finished, tmp_path):
    checkout, _ = finished
    done = run(["dvc", "repro"], checkout)
    assert "Data and pipelines are up to date." in done.stdout, done.stdout + done.stderr
    metrics = run(["dvc", "metrics", "show", "--json"], checkout)
    assert "reports/evaluate/metrics.json" in metrics.stdout
    plots = run(["dvc", "plots", "show", "-o", str(tmp_path)], checkout)
    assert plots.returncode == 0, plots.stderr
    assert "objective/kl" in (tmp_path / "index.html").read_text()


def test_push_and_pull_work_with_the_default_remote(finished):
    checkout, _ = finished
    assert run(["dvc", "push"], checkout).returncode == 0
    shutil.rmtree(checkout / "models" / "policy")
    shutil.rmtree(checkout / ".dvc" / "cache")
    done = run(["dvc", "pull"], checkout)
    assert done.returncode == 0, done.stderr
    assert (checkout / "models" / "policy" / "model.safetensors").is_file()


def test_every_stage_is_a_child_run_of_the_flow_with_its_metrics(finished):
    checkout, _ = finished
    client = open_client(checkout)
    experiment = client.get_experiment_by_name("rlhf").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = (r for r in runs if r.info.run_name == "train")
    children = {
        r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert set(children) == set(STAGES)
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert len(parent.data.tags["git.commit"]) == 40
    steps = client.get_metric_history(children["ppo"].info.run_id, "objective/kl")
    assert [m.step for m in steps] == list(range(len(steps)))
    assert len(steps) > 2
    (used,) = children["ppo"].inputs.dataset_inputs
    assert len(used.dataset.digest) == 32
    used_rows = load_params(checkout / "params.yaml").sft.num_rows
    assert children["sft"].data.params["sft.num_rows"] == str(used_rows)


def test_registered_policy_loads_and_answers_a_chat_request(finished, monkeypatch):
    import mlflow

    checkout, _ = finished
    monkeypatch.chdir(checkout)
    client = open_client(checkout)
    version = client.get_model_version_by_alias("rlhf-policy", "candidate")
    assert version.tags["dvc.lock.md5"]
    assert registered_model_dir("models:/rlhf-policy@candidate", checkout).joinpath("config.json").is_file()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{checkout}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/rlhf-policy@candidate")
    assert model.metadata.signature is not None
    assert model.metadata.metadata["chat_template"]
    reply = model.predict(QUESTION)
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["usage"]["completion_tokens"] <= 8
    again = model.predict(QUESTION)
    assert again["choices"] == reply["choices"]


def test_second_run_takes_everything_from_the_cache_and_registers_nothing_new(finished):
    checkout, _ = finished
    done = run(["rlhf", "run"], checkout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("didn't change, skipping") + done.stderr.count("didn't change, skipping") == len(
        STAGES
    )
    versions = open_client(checkout).search_model_versions("name='rlhf-policy'")
    assert [v.version for v in versions] == [1] or [str(v.version) for v in versions] == ["1"]


def test_data_that_fails_a_critical_expectation_stops_before_any_training(finished, tmp_path):
    commit(finished[0], "keep the run")
    checkout = clone_with_cache(finished[0], tmp_path / "rlhf")
    done = run(["rlhf", "run", "-S", "validate.max_prompt_tokens=3"], checkout)
    assert done.returncode == 3 or done.returncode == 1
    assert "not fit to train on" in done.stderr
    assert "package:chitchat:" in done.stderr
    assert "Traceback" not in done.stderr
    assert (checkout / ".rlhf" / "runs" / "validate" / "report" / "index.html").is_file()
    assert not (checkout / "models" / "pretrained").exists()


def test_without_git_there_is_one_clear_error(root, tmp_path):
    checkout = make_checkout(root, tmp_path)
    shutil.rmtree(checkout / ".git")
    done = run(["rlhf", "run"], checkout, GIT_CEILING_DIRECTORIES=str(tmp_path.parent))
    assert done.returncode == 2
    assert "not in a git repository" in done.stderr
    assert "git init" in done.stderr
    assert "Traceback" not in done.stderr


def test_experiment_changes_one_stage_and_the_checkout_stays(finished, tmp_path):
    checkout, _ = finished
    commit(checkout, "the run")
    before = (checkout / "params.yaml").read_text()
    done = run(["dvc", "exp", "run", "-S", "evaluate.num_prompts=16", "--temp", "-n", "fewer"], checkout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (checkout / "params.yaml").read_text() == before
    ran = [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["evaluate"]
    shown = run(["dvc", "metrics", "diff", "HEAD", "fewer", "--json"], checkout)
    changes = json.loads(shown.stdout)
    assert changes["reports/evaluate/metrics.json"]["eval/num_prompts"]["new"] == 16
    assert "reports/ppo/metrics.json" not in changes
    listed = run(["dvc", "exp", "show", "--csv"], checkout).stdout.splitlines()
    assert any("fewer" in line for line in listed[1:]), listed
    drawn = run(["dvc", "plots", "diff", "HEAD", "fewer", "-o", str(tmp_path)], checkout)
    assert drawn.returncode == 0, drawn.stderr
    assert '"rev": "fewer"' in (tmp_path / "index.html").read_text()

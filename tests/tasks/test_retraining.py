"""How far votes are used, the data set of a run, where the champion comes from, what a run's values are."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest
import yaml

from feedback.collection import collect
from feedback.history import Votes
from feedback.records import Annotator, Choice, Correction, Item, Project, Vote
from rlhf_core.config import parse_params, read_yaml
from rlhf_core.data.split import split_of
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import open_client
from tasks import retraining, worktrees
from tasks.workspace import BusyError

NOW = datetime(2026, 11, 20, tzinfo=UTC)
FIRST = Choice(choice="a", strength=2)


def command(where, *words):
    return subprocess.run(words, cwd=where, capture_output=True, text=True, check=True).stdout.strip()


def with_values(root, **sections):
    tree = read_yaml(root / "params.yaml")
    for name, values in sections.items():
        tree[name] |= values
    return parse_params(tree, "test")


@pytest.fixture
def home(tmp_path, monkeypatch, root):
    """A checkout under git and DVC that ignores what ours ignores."""
    for variable in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(variable, "/dev/null")
    for variable in ("MLFLOW_TRACKING_URI", "RLHF_FEEDBACK_DB"):
        monkeypatch.delenv(variable, raising=False)
    made = tmp_path / "home"
    made.mkdir()
    command(made, "git", "init", "-q", "-b", "main")
    command(made, sys.executable, "-m", "dvc", "init", "-q")
    for name in (".gitignore", "params.yaml", "dvc.yaml"):
        (made / name).write_text((root / name).read_text())
    command(made, "git", "add", "-A")
    command(made, "git", *worktrees.NOBODY, "commit", "-q", "-m", "start")
    return made


def votes_on(prompts, *, corrections=(), new=None, number=7, judged=FIRST):
    """Ann says `judged` of two answers to each prompt (the first is better), and corrects others."""
    ann = [Annotator(id="ann", name="Ann")]
    said = []
    for kind, asked in (("pairwise", prompts), ("correction", corrections)):
        project = Project(id=f"p-{kind}", name="P", kind=kind)
        texts = ["a good answer", "a bad answer"][: 2 if kind == "pairwise" else 1]
        value = judged if kind == "pairwise" else Correction(text="a better answer")
        items = [
            Item(
                id=f"{kind}-{i}",
                project=project.id,
                kind=kind,
                messages=[{"role": "user", "content": prompt}],
                responses=[{"text": text} for text in texts],
            )
            for i, prompt in enumerate(asked)
        ]
        cast = [
            Vote(
                id=f"v-{item.id}",
                project=project.id,
                item=item.id,
                annotator="ann",
                kind=kind,
                value=value,
                seconds=5.0,
                at=NOW,
            )
            for item in items
        ]
        if items:
            said.append(collect(project, items, cast, ann))
    ids = {vote.id: vote.item for one in said for vote in one.votes}
    fresh = frozenset(ids if new is None else new)
    return Votes("log", number, NOW, tuple(said), fresh, frozenset(ids[one] for one in fresh), 3)


PROMPTS = [f"what do you think of number {n}?" for n in range(60)]


def version(home, name="rlhf-policy", **tags):
    client = open_client(home)
    if not client.search_registered_models(f"name='{name}'"):
        client.create_registered_model(name)
    return str(client.create_model_version(name, "nowhere", tags=tags).version)


def test_votes_count_as_used_once_a_version_says_so_and_by_their_own_log(home, params):
    assert retraining.used_to(home, params, "log") == 0
    version(home, **{"feedback.store": "log", "feedback.used_to": "12"})
    version(home, **{"feedback.store": "log", "feedback.used_to": "9"})
    version(home, **{"feedback.store": "another log", "feedback.used_to": "99"})
    version(home, **{"feedback.store": "log", "feedback.last_event": "50"})  # it died before its end
    assert retraining.used_to(home, params, "log") == 12
    assert retraining.used_to(home, params, "another log") == 99
    assert retraining.used_to(home, params, "") == 0


def test_a_death_at_any_point_of_the_last_step_loses_no_vote(home, params, monkeypatch):
    """Whatever tag is the last one written, votes are either new still, or used, and never half."""
    made = version(home)
    registered = f"models:/rlhf-policy@candidate (version {made})"
    manifest = {"store": "log", "last_event": 40}
    client_type = type(open_client(home))
    real = client_type.set_model_version_tag
    for at in range(3):
        written = []

        def dying(self, *arguments, written=written, at=at, **options):
            if len(written) == at:
                raise ConnectionError("the store is gone")
            written.append(arguments)
            return real(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(client_type, "set_model_version_tag", dying)
            if at < 2:
                with pytest.raises(ConnectionError):
                    retraining.mark_used(home, params, registered, manifest)
            else:
                retraining.mark_used(home, params, registered, manifest)
        assert retraining.used_to(home, params, "log") == (40 if at == 2 else 0)
    retraining.mark_used(home, params, registered, manifest)
    assert retraining.used_to(home, params, "log") == 40


@pytest.mark.parametrize(("new", "enough"), [(0, False), (49, False), (50, True), (60, True)])
def test_too_few_new_votes_are_said(params, new, enough):
    votes = votes_on(PROMPTS, new=[f"v-pairwise-{n}" for n in range(new)])
    said = retraining.too_few(votes, params)
    assert (said == "") is enough
    if not enough:
        assert said == f"{new} new votes since event 3, and retrain.min_votes is 50: nothing to train"


def test_two_retrainings_are_never_at_once(home):
    busy = pytest.raises(BusyError, match=r"a retraining is going on \(process \d+\)")
    with retraining.one_at_a_time(home, wait=False), busy:
        retraining.one_at_a_time(home, wait=False).__enter__()
    waited = []
    with retraining.one_at_a_time(home, wait=True, say=waited.append):
        assert waited == []


def test_the_second_waits_for_the_first_where_it_may(home):
    holding = (
        "import sys, time; from pathlib import Path; from tasks.retraining import one_at_a_time\n"
        "with one_at_a_time(Path(sys.argv[1]), wait=False): print('held', flush=True); time.sleep(1.0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(home)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        said = []
        with retraining.one_at_a_time(home, wait=True, say=said.append):
            assert other.wait(60) == 0
    assert said == [f"a retraining is going on (process {other.pid}); waiting for it"]


def test_the_data_set_is_a_version_under_dvc_on_the_runs_branch(home, root):
    params = with_values(root, retrain={"license": "CC-BY-4.0"})
    with worktrees.run_place(home, "r1", "") as place:
        assert retraining.dataset_in(place.root) is None
        data = retraining.build(place.root, params, votes_on(PROMPTS))
        retraining.write_dataset(place, data)
        assert retraining.dataset_in(place.root) == data.manifest
        md5 = retraining.md5_of(place.root, retraining.FEEDBACK)
        assert md5.endswith(".dir")
        committed = yaml.safe_load(command(home, "git", "show", "runs/r1:data/feedback.dvc"))
        assert committed["outs"][0]["md5"] == md5
        tags = retraining.lineage(params, place.root, data.manifest, None)
        assert tags["dvc.data.feedback"] == md5
        assert (tags["feedback.last_event"], tags["feedback.votes"]) == ("7", "60")
    worktrees.remove(place)
    # Whoever repeats the run has the same data, from the cache.
    with worktrees.run_place(home, "r2", "runs/r1") as again:
        worktrees.bring_data(again, params)
        assert retraining.dataset_in(again.root) == data.manifest


def test_another_vote_is_another_path_so_dvc_sees_it(home, root, params):
    one, other = (retraining.build(home, params, votes_on(PROMPTS[:count])) for count in (30, 31))
    one.write(home / retraining.FEEDBACK)
    first = retraining.values_for(params, home, one.manifest, None)["data.preferences"]
    other.write(home / retraining.FEEDBACK)
    second = retraining.values_for(params, home, other.manifest, None)["data.preferences"]
    assert first != second
    assert all((home / path).is_file() for path in second)


def test_people_alone_train_and_ai_pairs_measure_where_few_are_held_out(home, root):
    params = with_values(root, retrain={"min_held_out": 10})
    held_out = [prompt for prompt in PROMPTS if split_of(prompt, params.data.eval_fraction) == "eval"]
    learnt = [prompt for prompt in PROMPTS if prompt not in held_out]
    assert len(held_out) >= 10
    for prompts, measured_by_people in ((PROMPTS, True), (learnt + held_out[:9], False)):
        data = retraining.build(home, params, votes_on(prompts))
        data.write(home / retraining.FEEDBACK)
        values = retraining.values_for(params, home, data.manifest, None)
        assert values["preferences.num_prompts"] == 0
        assert values["preferences.max_human_pairs"] == len(prompts)
        assert ("preferences.num_eval_prompts" in values) is measured_by_people
        assert "data.demonstrations" not in values, "SFT stays as it is without corrections"


def test_ties_measure_nothing_and_do_not_count_as_held_out_pairs(home, root):
    params = with_values(root, retrain={"min_held_out": 10, "ties": "keep"})
    held_out = [prompt for prompt in PROMPTS if split_of(prompt, params.data.eval_fraction) == "eval"]
    learnt = [prompt for prompt in PROMPTS if prompt not in held_out]
    assert len(held_out) >= 10
    data = retraining.build(home, params, votes_on(learnt + held_out[:10], judged=Choice(choice="tie")))
    assert len(data.preferences) == len(learnt) + 10
    data.write(home / retraining.FEEDBACK)
    assert "preferences.num_eval_prompts" not in retraining.values_for(params, home, data.manifest, None)


def test_a_prompt_may_hold_any_line_separator(home, root):
    params = with_values(root, retrain={"min_held_out": 1})
    prompts = [f"{prompt}\u2028and\x85so on" for prompt in PROMPTS]
    data = retraining.build(home, params, votes_on(prompts[10:], corrections=prompts[:10]))
    data.write(home / retraining.FEEDBACK)
    values = retraining.values_for(params, home, data.manifest, None)
    assert values["preferences.max_human_pairs"] == len(prompts) - 10


def test_mixed_keeps_ai_pairs_and_ai_alone_takes_no_vote(home, root):
    mixed = with_values(root, retrain={"labels": "mixed"})
    data = retraining.build(home, mixed, votes_on(PROMPTS))
    data.write(home / retraining.FEEDBACK)
    values = retraining.values_for(mixed, home, data.manifest, None)
    assert "preferences.num_prompts" not in values
    assert values["preferences.max_human_pairs"] == 60
    alone = retraining.values_for(with_values(root, retrain={"labels": "ai"}), home, None, None)
    assert alone == {"ppo.start": "sft", "preferences.max_human_pairs": 0}


def demonstrations(home, count):
    rows = [{"prompt": f"tell me about thing {n}", "response": f"thing {n} is fine"} for n in range(count)]
    (home / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_sft_learns_every_correction_and_is_filled_up_with_others(home, root):
    demonstrations(home, 400)
    params = with_values(
        root, data={"demonstrations": ["demos.jsonl"]}, sft={"num_rows": 50, "num_eval_rows": 5}
    )
    corrected = PROMPTS[:20]
    data = retraining.build(home, params, votes_on(PROMPTS[20:], corrections=corrected))
    data.write(home / retraining.FEEDBACK)
    values = retraining.values_for(params, home, data.manifest, None)
    rows = [json.loads(line) for line in (home / values["data.demonstrations"][0]).read_text().splitlines()]
    ours = [row for row in rows if row["response"] == "a better answer"]
    assert len(ours) == 20
    by_split = [split_of(row["prompt"], params.data.eval_fraction) for row in rows]
    assert by_split.count("train") == 50, "as many as SFT takes, so it takes all corrections"
    others = [s for row, s in zip(rows, by_split) if row not in ours]
    assert others.count("eval") == 4 * 5


def test_base_pairs_come_in_by_their_weight(home, root):
    pairs = [
        {"prompt": f"tell me about thing {n}", "chosen": f"thing {n} is fine", "rejected": "no"}
        for n in range(30)
    ]
    pairs.append({"prompt": "short", "chosen": "thing", "rejected": "no"})  # prepare puts it aside, so do we
    (home / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = {"preferences": ["base.jsonl"]}
    for weight, count in ((0.0, 0), (1.0, 30)):
        params = with_values(root, data=data, retrain={"base_weight": weight})
        kept = retraining.build(home, params, votes_on(PROMPTS)).manifest["pairs"]["kept"]
        assert kept == {"new": 60, "old": 0, "base": count}


def policy(home, text):
    """A policy that DVC knows, and its md5."""
    directory = home / "models" / "made"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").write_text(text)
    worktrees.dvc(home, "add", "-q", "models/made")
    return retraining.md5_of(home, retraining.CHAMPION_DIR.with_name("made"))


def test_the_champion_comes_by_its_md5_and_dvc_knows_it(home, params):
    assert retraining.find_champion(home, params) is None
    md5 = policy(home, "weights")
    made = version(home, **{"dvc.models.policy": md5})
    open_client(home).set_registered_model_alias("rlhf-policy", "champion", made)
    champion = retraining.find_champion(home, params)
    assert (champion.version, champion.md5) == (made, md5)
    with worktrees.run_place(home, "r1", "") as place:
        retraining.bring_champion(place, champion)
        assert (place.root / "models" / "champion" / "model.safetensors").read_text() == "weights"
        assert retraining.md5_of(place.root, retraining.CHAMPION_DIR) == md5
    assert "models/champion.dvc" in command(home, "git", "ls-tree", "-r", "--name-only", "runs/r1")
    open_client(home).delete_model_version_tag("rlhf-policy", made, "dvc.models.policy")
    with pytest.raises(InputError, match=r"version 1, the champion .* set retrain.start to sft"):
        retraining.find_champion(home, params)


def test_another_champion_makes_ppo_stale_and_only_where_it_starts_there(home, root):
    """The stage as dvc.yaml has it, with a command that takes no time."""
    stage = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]["ppo"]
    wanted = {**stage, "cmd": "mkdir -p models/policy && cp models/sft/w models/policy/w"}
    wanted |= {"metrics": [], "plots": []}
    (home / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ppo": wanted}}))
    for dep in [*(d for d in stage["deps"] if "${" not in d), "models/champion"]:
        path = home / dep / "w" if dep.startswith("models/") or "." not in dep else home / dep
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first")

    def stale():
        return json.loads(worktrees.dvc(home, "status", "--json", "ppo"))

    for start, follows in (("sft", False), ("champion", True)):
        tree = read_yaml(root / "params.yaml")
        tree["ppo"]["start"] = start
        Layout(home).params.write_text(yaml.safe_dump(tree))
        (home / "models" / "champion" / "w").write_text("first")
        worktrees.dvc(home, "repro", "-q", "ppo")
        assert not stale()
        (home / "models" / "champion" / "w").write_text(f"another, after {start}")
        assert bool(stale()) is follows
    worktrees.dvc(home, "repro", "-q", "ppo")
    lock = yaml.safe_load((home / "dvc.lock").read_text())["stages"]["ppo"]
    assert "models/champion" in [dep["path"] for dep in lock["deps"]]


def test_a_checkout_without_votes_says_where_they_come_from(home, params):
    with pytest.raises(InputError, match=r"feedback.db: no votes have been collected here"):
        retraining.read_votes(home, params)

"""The policy as an MLflow model: how it is logged. Loading and answering is tested on a finished run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import yaml

LOG = """
import sys
import mlflow
from pathlib import Path
from rlhf_core.serving import log_policy
mlflow.set_tracking_uri("sqlite:///mlflow.db")
with mlflow.start_run():
    info = log_policy(Path(sys.argv[1]), "policy")
print(info.registered_model_version, Path(info.artifact_path.removeprefix("file://")))
sys.exit("torch was loaded" if "torch" in sys.modules else 0)
"""


def test_logging_a_policy_does_not_load_it_and_keeps_an_example(tiny_model_dir, root, tmp_path):
    found = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", LOG, str(tiny_model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=found)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "input example" not in done.stderr
    version, _, directory = done.stdout.strip().splitlines()[-1].partition(" ")
    assert version == "1"
    with open(f"{directory}/MLmodel", encoding="utf-8") as file:
        facts = yaml.safe_load(file)["metadata"]
    assert json.loads(facts["example"])["messages"]

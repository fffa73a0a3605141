"""Checkpoints of a training in progress: whole or absent, checksummed, tied to what they were trained from.

Tensors are safetensors and the rest JSON; nothing pickled is read. Random streams need no state here: each
step derives its own from the seed and its number.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core import ranks
from rlhf_core.atomic import staged_dir
from rlhf_core.modeling import sharding
from rlhf_core.optim import Optimizer, parameters_of

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage below `directory`; `origin` says from what they are trained."""

    def __init__(self, directory: Path, origin: Mapping[str, Any]) -> None:
        self.directory = directory
        self.origin = json.loads(json.dumps(origin))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        tensors = {name: sharding.whole(tensor.detach()) for name, tensor in tensors.items()}
        if not ranks.is_first():
            return
        final = self.directory / f"step-{step:08d}"
        with staged_dir(final) as out:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                out / "tensors.safetensors",
            )
            (out / "state.json").write_text(json.dumps(state))
            sums = {name: sha256(out / name) for name in ("tensors.safetensors", "state.json")}
            (out / "manifest.json").write_text(json.dumps({"origin": self.origin, "sha256": sums}))
        for old in self._finished()[:-KEEP]:
            shutil.rmtree(old)

    def load_latest(self) -> Checkpoint | None:
        """The newest whole checkpoint of the same origin, or None. Says on stderr what it passes over."""
        for path in reversed(self._finished()):
            fault = self._fault(path)
            if fault is None:
                return self._read(path)
            print(f"{path}: passed over: {fault}", file=sys.stderr)
        return None

    def clear(self) -> None:
        if ranks.is_first():
            shutil.rmtree(self.directory, ignore_errors=True)

    def _finished(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))

    def _fault(self, path: Path) -> str | None:
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            for name, expected in manifest["sha256"].items():
                if sha256(path / name) != expected:
                    return f"{name} is damaged"
        except (OSError, ValueError, KeyError) as error:
            return f"not readable ({error})"
        if manifest["origin"] != self.origin:
            return "it belongs to another run: " + ", ".join(_differences(manifest["origin"], self.origin))
        return None

    def _read(self, path: Path) -> Checkpoint:
        from safetensors.torch import load_file

        state = json.loads((path / "state.json").read_text())
        return Checkpoint(load_file(path / "tensors.safetensors"), state)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a!r}, is {b!r}")
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inputs_digest(paths: Sequence[Path]) -> dict[str, str]:
    """sha256 of each input file or of the weights of each input model, by name."""
    digests = {}
    for path in paths:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        for file in files:
            digests[f"{file.parent.name}/{file.name}"] = sha256(file)
    return digests


def optimizer_tensors(optimizer: Optimizer, prefix: str) -> dict[str, Tensor]:
    """The moments of an optimizer as flat named tensors."""
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer_tensors(optimizer: Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    parameters = parameters_of(optimizer)
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            _, index, name = key.rsplit(".", 2)
            like = parameters[int(index)]
            states.setdefault(int(index), {})[name] = (
                sharding.placed_like(value, like) if value.shape == like.shape else value
            )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def parameter_tensors(parameters: Sequence[nn.Parameter], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{i}": p for i, p in enumerate(parameters)}


@torch.no_grad()
def load_parameter_tensors(
    parameters: Sequence[nn.Parameter], prefix: str, tensors: Mapping[str, Tensor]
) -> None:
    for i, parameter in enumerate(parameters):
        parameter.copy_(sharding.placed_like(tensors[f"{prefix}.{i}"], parameter))

"""Where versions come from: the aliases of the registry, or one model that stays."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.config import RunConfig
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.mlflow_writer import open_client, registered_model_dir, tracking_uri
from serving.fleet import CHALLENGER, CHAMPION
from serving.models import Capacity, Live, Version, digest_of, load
from tasks import ledger

log = logging.getLogger(__name__)


@dataclass
class RegistrySource:
    """The registered model `name`: its champion, the candidate while there is none, and a challenger's alias
    or version."""

    root: Path
    name: str
    challenger: str
    run: RunConfig
    capacity: Capacity
    _client: Any = field(default=None, repr=False)
    _told: str = field(default="", repr=False)

    def wanted(self) -> dict[str, Version]:
        """Raises InputError when nothing could answer, RLHFError when the registry cannot be read."""
        aliases = self._aliases()
        first = aliases.get(ledger.CHAMPION) or aliases.get(ledger.CANDIDATE)
        if not first:
            raise InputError(
                f"{self.name}: has no champion and no candidate in {tracking_uri(self.root)}; `rlhf run` "
                "makes a candidate, `rlhf promote` a champion; or serve a directory with --model"
            )
        self._tell(aliases, first)
        found = {CHAMPION: Version(self.name, first)}
        second = aliases.get(self.challenger, self.challenger if self.challenger.isdigit() else "")
        if second and second != first:
            found[CHALLENGER] = Version(self.name, second)
        return found

    def _aliases(self) -> dict[str, str]:
        from mlflow.exceptions import MlflowException

        try:
            if self._client is None:
                self._client = open_client(self.root)
            return ledger.Ledger(self._client, self.name).aliases()
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise RLHFError(f"{tracking_uri(self.root)}: {error}") from None
        except OSError as error:  # a server that is away
            raise RLHFError(f"{tracking_uri(self.root)}: {error}") from None

    def _tell(self, aliases: dict[str, str], first: str) -> None:
        """Say once when the candidate stands in for the champion, or when there is no challenger."""
        said = ""
        if ledger.CHAMPION not in aliases:
            said = f"{self.name} has no champion yet: the candidate, version {first}, answers"
        elif self.challenger and not self.challenger.isdigit() and self.challenger not in aliases:
            said = f"{self.name} has no {self.challenger}: the champion gets its share too"
        if said and said != self._told:
            log.warning(said)
        self._told = said

    def load(self, version: Version) -> Live:
        """Raises InputError when there is no such version, or when its weights are damaged."""
        with tempfile.TemporaryDirectory(prefix="rlhf-serve-") as place:
            directory = registered_model_dir(
                f"models:/{version.name}/{version.number}", self.root, Path(place)
            )
            return load(version, directory, self.run, self.capacity)


@dataclass
class DirectorySource:
    """One model, which never changes."""

    directory: Path
    name: str
    run: RunConfig
    capacity: Capacity

    def wanted(self) -> dict[str, Version]:
        return {CHAMPION: self.version}

    @property
    def version(self) -> Version:
        return Version(self.name, digest_of(self.directory))

    def load(self, version: Version) -> Live:
        """Raises InputError for a directory that is absent or damaged."""
        return load(version, self.directory, self.run, self.capacity)

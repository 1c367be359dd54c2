"""The release ledger: an append-only, hash-chained record of everything that was done to a registered model.

It lies in MLflow itself, so that every machine sees it: each entry is a version of the registered model
`NAME.ledger`, because numbering versions is what MLflow does one at a time, whoever asks. An entry names the digest
of the one before it, and of two that name the same one the first counts (see hash_chain). Appending is therefore
a compare-and-swap, and whoever appends knows at once whether somebody was faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient

from edgeopt.core.config_objects import canonical_json
from edgeopt.errors import GateError, TrackingError
from edgeopt.release.ledger import hash_chain
from edgeopt.release.ledger.hash_chain import ENTRY, SUFFIX, Entry, Reading
from edgeopt.release.registry import client as registry

_BEAT = "edgeopt.beat"
_SOURCE = "edgeopt-ledger:/entry"  # MLflow wants one; there are no files behind an entry
_LONGEST = 100_000  # characters in a tag of a version
_DESCRIPTION = (
    "What was registered, approved, promoted and rolled back, by whom and why. Written by edgeopt, to be read only: "
    "`edgeopt audit` finds what was changed by hand."
)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger of the registered model `model`."""

    client: MlflowClient
    model: str

    @property
    def name(self) -> str:
        return self.model + SUFFIX

    def read(self) -> Reading:
        """All of it; empty where nothing was ever done."""
        return hash_chain.read(registry.registered(self.client, self.name).versions)

    def append(
        self, seen: Reading, *, kind: str, actor: str, reason: str, facts: Mapping[str, Any], told: str
    ) -> Reading:
        """Write an entry after the last that was `seen`; `told` says it to people.

        Raises GateError where somebody else wrote first: what was to be written does not count then.
        """
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = Entry(
            number=len(seen.entries) + 1,
            previous=seen.head,
            kind=kind,
            actor=actor,
            at=at,
            reason=reason,
            facts=facts,
        )
        text = canonical_json(entry.to_json())
        if len(text) > _LONGEST:
            raise TrackingError(f"an entry of {len(text)} characters is too long for {self.name}")
        if not seen.last:
            registry.ensure_model(self.client, self.name, _DESCRIPTION)
        version = self.client.create_model_version(self.name, _SOURCE, tags={ENTRY: text}, description=told)
        number = int(version.version)
        if number == seen.last + 1:
            return replace(seen, entries=(*seen.entries, entry), last=number)
        now = self.read()
        if now.entries[entry.number - 1 : entry.number] != (entry,):
            raise GateError(
                "somebody else changed this model at the same moment, so nothing was done",
                location=self.model,
                hint=f"See `edgeopt releases {self.model}`, and run the command again",
            )
        return now

    def beat(self, sign: str) -> None:
        """Give a sign of life."""
        self.client.set_registered_model_tag(self.name, _BEAT, sign)

    def last_beat(self) -> str:
        """The sign of life that was given last."""
        return str(self.client.get_registered_model(self.name).tags.get(_BEAT, ""))

"""Compare the registry with the ledger, and check the ledger's hash chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeopt.core import mlflow_tags as tags
from edgeopt.release.ledger import hash_chain
from edgeopt.release.ledger.hash_chain import LEDGER_SUFFIX, Entry
from edgeopt.release.ledger.history import History
from edgeopt.release.registry import fast_reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Result of an audit.

    Attributes:
        entries: the valid entries of the ledger.
        problems: one sentence for each difference; empty if registry and ledger agree.
        open_operation: action, user and start of an operation that has not ended; empty if there is none. If its
            process died, the next command completes or undoes it.
    """

    model: str
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    open_operation: str

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON data."""
        return {
            "model": self.model,
            "entries": [entry.to_json() for entry in self.entries],
            "faults": self.problems,
            "open": self.open_operation,
        }


def audit(model: str, *, tracking_uri: str | None = None) -> Audit:
    """Compare a registered model with its ledger and change nothing. `verify` checks the engines' files."""
    ledger, registered_model = fast_reader.read_models([model + LEDGER_SUFFIX, model], tracking_uri)
    state = hash_chain.read_chain(ledger.versions)
    history = History.from_entries(state.entries)
    digests = {version.number: version.tags.get(tags.ENGINE_DIGEST, "") for version in registered_model.versions}
    problems = [f"the ledger was manipulated: {problem}" for problem in state.problems]
    if history.open_operation is None:
        problems += history.alias_drift(registered_model.aliases)
        unrecorded = sorted(digests.keys() - history.registrations.keys(), key=int)
        problems += [f"version {number} was registered without the ledger" for number in unrecorded]
    for number, registration in history.registrations.items():
        if number not in digests:
            problems.append(f"version {number} was deleted")
        elif digests[number] != registration.digest:
            problems.append(f"version {number} has another engine digest than was registered")
    operation, open_operation = history.open_operation, ""
    if operation is not None:
        open_operation = f"{operation.event.action} by {operation.entry.actor} since {operation.entry.at}"
    return Audit(model=model, entries=state.entries, problems=tuple(problems), open_operation=open_operation)

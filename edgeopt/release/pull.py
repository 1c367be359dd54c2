"""Download a registered engine to this machine after verifying it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgeopt.core.artifact import Engine
from edgeopt.core.corpus import Text, TextSummary
from edgeopt.core.result import Measurement
from edgeopt.errors import InputError
from edgeopt.release.candidate import read_trial
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference
from edgeopt.release.verify import Verification, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledEngine:
    """An engine that was pulled.

    Attributes:
        recorded: measurements of the engine's trial; empty if its run is not in this store.
        recorded_text: the text that evaluated the trial; None if it is unknown.
    """

    engine: Engine
    verification: Verification
    recorded: tuple[Measurement, ...]
    recorded_text: TextSummary | None = None

    def text_warning(self, text: Text) -> str:
        """Return a warning if `text` differs from the text that evaluated the trial; empty if they are equal."""
        measured = f"{text.name} (sha256 {text.digest[:12]}…)"
        if not self.recorded:
            return ""
        if self.recorded_text is None:
            return f"quality was measured on {measured}; the text of the recorded values is unknown"
        if self.recorded_text.digest == text.digest:
            return ""
        recorded = f"{self.recorded_text.name} (sha256 {self.recorded_text.digest[:12]}…)"
        return (
            f"quality was measured on {measured}, but the recorded values are for {recorded}: do not compare them, or "
            "measure again with text@evaluation=file evaluation.path=FILE"
        )


def pull(
    reference: Reference, folder: Path, *, public_key: Path | None = None, tracking_uri: str | None = None
) -> PulledEngine:
    """Download the engine of a version to the new folder `folder`.

    Raises:
        InputError: the folder exists, or the version does not.
        GateError: a check failed; `folder` is not created.
    """
    if folder.exists():
        raise InputError("the folder already exists", location=str(folder), hint="Give another folder, or remove it")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with (
        registry.connect(tracking_uri) as client,
        tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}-") as scratch,
    ):
        version = reference.find(client)
        pinned = Reference(name=version.name, version=str(version.version))
        verification = verify(
            pinned, public_key=public_key, destination=Path(scratch) / "model", tracking_uri=tracking_uri
        )
        verification.require().directory.rename(folder)
        result = read_trial(client, client.get_run(version.run_id)).result if version.run_id else None
    return PulledEngine(
        engine=Engine.read(folder),
        verification=verification,
        recorded=result.measurements if result is not None else (),
        recorded_text=result.texts.get("evaluation") if result is not None else None,
    )

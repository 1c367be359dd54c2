"""Pull: a registered engine comes to this machine, verified before it lies where it was asked for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgeopt.core.artifact import Engine
from edgeopt.core.result import Measurement
from edgeopt.errors import InputError
from edgeopt.release.candidate import trial_of
from edgeopt.release.registry import client as registry
from edgeopt.release.registry.client import Reference
from edgeopt.release.verify import Verification, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """Attributes:
    promised: what was measured when the engine was made; empty where its run is not in this store.
    """

    engine: Engine
    verification: Verification
    promised: tuple[Measurement, ...]


def pull(
    reference: Reference, folder: Path, *, public_key: Path | None = None, tracking_uri: str | None = None
) -> Pulled:
    """The engine of a version in the new folder `folder`.

    Raises InputError where the folder is there already or the version is not, GateError where a check fails: nothing
    lies in `folder` then.
    """
    if folder.exists():
        raise InputError("the folder is there already", location=str(folder), hint="Name one that is not, or remove it")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with (
        registry.answering(tracking_uri) as client,
        tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}-") as scratch,
    ):
        version = reference.find(client)
        pinned = Reference(name=version.name, version=str(version.version))
        found = verify(pinned, public_key=public_key, destination=Path(scratch) / "model", tracking_uri=tracking_uri)
        found.require().directory.rename(folder)
        promised = trial_of(client, client.get_run(version.run_id)).result if version.run_id else None
    return Pulled(
        engine=Engine.read(folder),
        verification=found,
        promised=promised.measurements if promised is not None else (),
    )

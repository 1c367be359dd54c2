"""Build the engine of a logged run again, from the config that the run stores."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeopt.cache import StageCache
from edgeopt.config import assemble, trial_process
from edgeopt.core.artifact import Engine, link_tree
from edgeopt.core.protocols import Progress
from edgeopt.errors import BuildError
from edgeopt.pipeline.evaluate import evaluate
from edgeopt.runtimes.genai import producer
from edgeopt.runtimes.genai.runtime import Genai


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """An engine that was built again.

    Attributes:
        expected_digest: digest of the engine that the run measured.
        changed_versions: libraries whose version differs, with (version of the run, version now).
    """

    run_id: str
    engine: Engine
    expected_digest: str
    changed_versions: Mapping[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """Return True if it is the engine that the run measured."""
        return self.engine.digest == self.expected_digest

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "run_id": self.run_id,
            "engine": asdict(self.engine.summary()),
            "wanted": self.expected_digest,
            "same": self.same,
        }


def rebuild(run_id: str, *, state: Path, config_dir: Path | None, progress: Progress) -> Rebuilt:
    """Build the engine of a run again. Raises InputError for an unknown run, BuildError if building fails."""
    from edgeopt.tracking import logged_config

    trial_process.silence_libraries()
    logged = logged_config.read_logged_config(run_id)
    # The limits were judged when the run was made. They must not refuse the rebuild.
    config = {**logged.config, "state": str(state), "store": None, "limits": {}}
    store = assemble.open_cache(config)
    with store.protect():
        result = evaluate(assemble.build_job(config, config_dir), store, progress, build_only=True)
        if result.engine is None:
            failure = result.failure
            message = f"{failure.stage}: {failure.message}" if failure else "nothing was built"
            raise BuildError(message, location=run_id)
        engine = Engine.read(Path(result.engine.directory))
        if engine.digest != logged.engine_digest and engine.format == Genai.format and logged.git_commit:
            engine = _stamped(engine, logged.git_commit, store)
    now = logged_config.current_versions()
    changed = {
        name: (version, now.get(name, "none"))
        for name, version in sorted(logged.versions.items())
        if version != now.get(name)
    }
    return Rebuilt(run_id=run_id, engine=engine, expected_digest=logged.engine_digest, changed_versions=changed)


def _stamped(engine: Engine, commit: str, store: StageCache) -> Engine:
    """Return the engine as earlier versions of edgeopt built it in a checkout at `commit`."""

    def produce(directory: Path) -> None:
        link_tree(engine.directory, directory)
        for name in producer.GRAPHS:  # a linked file is shared with the other engine: replace it by a copy
            path = directory / name
            path.unlink()
            shutil.copyfile(engine.directory / name, path)
        producer.stamp(directory, commit)
        Engine.seal(directory, format=engine.format, spec=engine.spec, made_by=engine.made_by)

    return Engine.read(store.get_or_create_stage("engine", [engine.digest, "stamped", commit], produce).folder)

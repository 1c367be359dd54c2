"""A study as the commands see it: its trials, its runs in MLflow, its front and its champion."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgeopt import assembly, display
from edgeopt import config as configs
from edgeopt.commands.outcome import Document
from edgeopt.config import Config
from edgeopt.errors import ConfigError, InfeasibleError, InputError
from edgeopt.release import policy as policies
from edgeopt.release import registry
from edgeopt.release.policy import Policy
from edgeopt.release.promote import promote
from edgeopt.search.front import Objective, row
from edgeopt.search.study import Search, Study
from edgeopt.tracking.recorder import MlflowRecorder


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStudy:
    """A study, the config that made it, and the recorder of its runs."""

    study: Study
    recorder: MlflowRecorder
    config: Config
    config_dir: Path | None

    @classmethod
    def of(cls, config: Config, config_dir: Path | None) -> OpenStudy:
        search = configs.part(config, "search")
        if not isinstance(search, Search):
            raise ConfigError("it is no search", place="search._target_", mend="Name edgeopt.search.study.Search")
        known = assembly.known_metrics(config_dir)
        study = Study(
            folder=Path(config["state"]) / "studies" / search.study,
            search=search,
            objectives=tuple(Objective.parse(m, direction, known) for m, direction in search.objectives.items()),
            limits=configs.limits(config, known),
        )
        return cls(study=study, recorder=configs.part(config, "tracking"), config=config, config_dir=config_dir)

    @classmethod
    def find(cls, name: str | None, state: Path) -> OpenStudy:
        """A study of the folder `state`, by name or the latest."""
        found = sorted((state / "studies").glob("*/sweep.json"), key=lambda p: p.stat().st_mtime)
        by_name = {path.parent.name: path for path in found}
        if not by_name:
            raise InputError("there is no study", place=str(state), mend="Run edgeopt sweep first, or give --state")
        name = name or found[-1].parent.name
        if name not in by_name:
            choices = ", ".join(by_name)
            raise InputError(f"there is no study {name!r}", place=str(state), mend=f"Choose one of: {choices}")
        saved = json.loads(by_name[name].read_text())
        return cls.of(
            {**saved["config"], "state": str(state)}, Path(saved["config_dir"]) if saved["config_dir"] else None
        )

    def save(self) -> None:
        """Keep what `find` needs."""
        saved = {"config": self.config, "config_dir": None if self.config_dir is None else str(self.config_dir)}
        (self.study.folder / "sweep.json").write_text(json.dumps(saved))

    @property
    def name(self) -> str:
        return self.study.search.study

    def front(self) -> Document:
        """The document of `edgeopt front`, without the champion."""
        entries, ranks, runs = self.study.entries(), self.study.ranks(), self.recorder.runs(self.name)
        known = assembly.known_metrics(self.config_dir)
        bounds = {v.metric: v.bound for e in entries if e.result for v in e.result.verdicts if v.bound is not None}
        return {
            "study": self.name,
            "objectives": [
                {"metric": o.metric, "unit": known.get(o.metric, ""), "direction": o.direction}
                for o in self.study.objectives
            ],
            "limits": [
                {"metric": x.metric, "limit": str(x), "bound": bounds.get(x.metric, x.absolute), "unit": x.unit}
                for x in self.study.limits
            ],
            "trials": [
                row(e.number, e.state, e.params, e.result, ranks.get(e.number), runs.get(e.number)) for e in entries
            ],
            "front": sorted(number for number, rank in ranks.items() if rank == 1),
            "champion": None,
        }

    def policy(self, name: str, config_dir: Path | None = None) -> Policy:
        return policies.load(name, self._registry_folders(config_dir))

    def sweep_policy(self) -> Policy | None:
        """The policy by which the sweep itself promotes, where its config names one."""
        name = self.config.get("promote")
        return None if name is None else self.policy(name)

    def promote(self, document: Document, policy: Policy, config_dir: Path | None = None) -> Document:
        """Register the front's members; `document` is the front's. InfeasibleError where there is none."""
        if not document["front"]:
            raise nothing_feasible(document)
        with display.progress("promoting") as progress:
            return promote(
                study=self.name,
                rows=document["trials"],
                objectives=document["objectives"],
                limits=document["limits"],
                policy=policy,
                tracking_uri=self.recorder.uri,
                folders=self._registry_folders(config_dir),
                progress=progress,
            ).to_json()

    def champion(self, policy: Policy) -> Document | None:
        return registry.champion(policy.model, self.recorder.uri, study=self.name)

    def _registry_folders(self, config_dir: Path | None) -> list[Path]:
        folder = config_dir or self.config_dir
        return [folder / "registry"] if folder else []


def nothing_feasible(document: Document) -> InfeasibleError:
    """Which limit most trials break, so that a person knows where to look."""
    broken: dict[str, int] = {}
    for trial in document["trials"]:
        for metric, excess in trial["excess"].items():
            if excess is None or excess > 0:
                broken[metric] = broken.get(metric, 0) + 1
    worst = max(broken, key=lambda m: broken[m], default=None)
    why = f": {broken[worst]} of {len(document['trials'])} break {worst}" if worst else ""
    return InfeasibleError(
        f"no trial keeps every limit{why}; nothing was promoted",
        place=f"study {document['study']}",
        mend="Search longer, add smaller recipes, or set wider limits",
    )

"""Promotion: the front of a study becomes versions of one registered model, and aliases follow the policy."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from edgeopt.core import mlflow_tags as tags
from edgeopt.core.protocols import Progress
from edgeopt.core.recipe import label
from edgeopt.core.study_snapshot import StudySnapshot
from edgeopt.errors import ApprovalPendingError, GateError, InfeasibleError
from edgeopt.release import model_card, signature
from edgeopt.release.candidate import Candidate, GateVerdict, Remeasure
from edgeopt.release.ledger.operation import DESCRIPTION, Desk, link
from edgeopt.release.policy import Policy, find
from edgeopt.release.registry import client as registry
from edgeopt.release.run_gates import Judged, judge
from edgeopt.release.webhook import Webhooks

_INHERITED = (
    tags.RECIPE,
    tags.RECIPE_DIGEST,
    tags.ENGINE_DIGEST,
    tags.MANIFEST_SHA256,
    tags.TARGET,
    tags.DEVICE,
    tags.EMULATED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One member of the front; `version` is empty where it is not registered, `created` whether it was made now."""

    number: int
    run_id: str
    version: str
    created: bool
    aliases: tuple[str, ...]
    gates: tuple[GateVerdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What a promotion has left in the registry, or would leave.

    Attributes:
        aliases: alias → version, of the policy's aliases.
        moved: those of them that pointed elsewhere before → the version before, None where it is new.
        dry_run: nothing was done; a version that does not exist yet is empty.
    """

    model: str
    releases: tuple[Release, ...]
    aliases: Mapping[str, str]
    moved: Mapping[str, str | None]
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def promote(
    snapshot: StudySnapshot,
    *,
    policy: Policy,
    tracking_uri: str | None = None,
    config_dir: Path | None = None,
    private_key: Path | None = None,
    secret: str = "",
    remeasure: Remeasure | None = None,
    reason: str = "",
    dry_run: bool = False,
    progress: Progress = lambda _: None,
) -> Promotion:
    """Register every trial on the front once and set the aliases of the policy.

    No version is created unless every gate passes for every trial, and no alias moves before its version has its
    approvals. A second call, also after a kill, completes what is missing and changes nothing else.

    Args:
        config_dir: the user's config folder; its `registry` folder may hold a model card.
        private_key: signs the registered engines.
        secret: signs the messages to the policy's webhooks.
        remeasure: measures an engine on this machine, for gates that need it.
        dry_run: runs the gates and changes nothing; refusals are returned, not raised.

    Raises:
        InfeasibleError: the front is empty.
        GateError: a gate refused; the message holds every refusal.
        TrackingError: MLflow refused.
    """
    if not snapshot.front:
        raise InfeasibleError(
            f"no trial of study {snapshot.study!r} satisfies every limit, so nothing is promoted",
            location="limits",
            hint="`edgeopt front` shows how far each trial exceeds its limits: search longer, or set wider limits",
        )
    study = snapshot.study
    with registry.answering(tracking_uri) as client, tempfile.TemporaryDirectory() as scratch:
        desk = Desk(client, policy.model, progress)
        case = _Case(desk, policy, study, private_key)
        judged = partial(
            judge,
            desk,
            policy,
            snapshot.front,
            snapshot.limits,
            Path(scratch),
            private_key=private_key,
            remeasure=remeasure,
        )
        if dry_run:
            return case.plan(judged())
        template = find("model_card.md.j2", config_dir)
        webhooks = Webhooks(urls=policy.webhooks, secret=secret)
        with desk.operation("promotion", reason, study=study, policy=policy.name, webhooks=list(policy.webhooks)):
            found = judged()
            case.require(found)
            cards = [
                model_card.render(
                    template, one.candidate, study=study, model=policy.model, objectives=snapshot.objectives
                )
                for one in found
            ]
            done = case.release(found, cards)
        webhooks.deliver(desk)
        return done


@dataclass(frozen=True, slots=True)
class _Case:
    """One promotion: its candidates are registered and pointed at."""

    desk: Desk
    policy: Policy
    study: str
    private_key: Path | None

    def require(self, judged: Sequence[Judged]) -> None:
        """Keep the verdicts in the ledger; GateError with every refusal."""
        told = {str(one.number): [[v.gate, v.passed, v.evidence[:500]] for v in one.verdicts] for one in judged}
        self.desk.note("judged", policy=self.policy.name, verdicts=told)
        refused = [refusal for one in judged for refusal in one.refusals]
        if refused:
            raise GateError(
                f"nothing was promoted, {len(refused)} refused: {'; '.join(refused)}",
                location=f"registry policy {self.policy.name}",
            )

    def release(self, judged: Sequence[Judged], cards: Sequence[str]) -> Promotion:
        """Register all of them, and move the aliases."""
        registry.ensure_model(self.desk.client, self.policy.model, DESCRIPTION)
        releases = []
        for one, text in zip(judged, cards, strict=True):
            self.desk.progress(f"registering trial {one.number}")
            version, created = self._ensure_version(one.candidate, text)
            self.desk.register(version)
            releases.append(self._release(one, str(version.version), created=created))
        aliases = {alias: release.version for release in releases for alias in release.aliases}
        lacking = [text for alias in aliases if (text := self._lacking(alias, aliases[alias]))]
        if lacking:
            names = ", ".join(f"{self.policy.model}/{release.version}" for release in releases)
            raise ApprovalPendingError(
                f"registered and waiting for approval: {names}. No alias moved: {'; '.join(dict.fromkeys(lacking))}",
                location=f"registry policy {self.policy.name}",
                hint="Promote again once it is approved",
            )
        moved = self.desk.move(aliases)
        self.desk.retire(self._spare(releases))
        return Promotion(model=self.policy.model, releases=tuple(releases), aliases=aliases, moved=moved)

    def plan(self, judged: Sequence[Judged]) -> Promotion:
        """What `release` would do, as far as it is known beforehand."""
        releases = [self._release(one, self._known(one.candidate), created=False) for one in judged]
        aliases = {alias: release.version for release in releases for alias in release.aliases}
        now = registry.aliases(self.desk.client, self.policy.model)
        moved = {
            alias: now.get(alias) for alias, version in aliases.items() if now.get(alias) != version or not version
        }
        return Promotion(model=self.policy.model, releases=tuple(releases), aliases=aliases, moved=moved, dry_run=True)

    # inside

    def _spare(self, releases: Sequence[Release]) -> list[str]:
        """Versions beyond those that the policy keeps, the oldest first: of earlier fronts, and without an alias."""
        if self.policy.versions_kept is None:
            return []
        wanted = {release.version for release in releases} | set(self.desk.history.aliases.values())
        unnamed = sorted((v for v in self.desk.history.registered if v not in wanted), key=int)
        return unnamed[: max(0, len(unnamed) - self.policy.versions_kept)]

    def _release(self, one: Judged, version: str, *, created: bool) -> Release:
        return Release(
            number=one.number,
            run_id=one.candidate.run_id,
            version=version,
            created=created,
            aliases=one.candidate.aliases,
            gates=one.verdicts,
        )

    def _lacking(self, alias: str, version: str) -> str:
        """What speaks against letting `alias` point at `version`: approvals that are missing."""
        history = self.desk.history
        if history.aliases.get(alias) == version:
            return ""
        known = history.registered[version]
        given = history.approvers(version, known.digest)
        count, wanted = len(given - {known.actor}), self.policy.approvals
        if count >= wanted:
            return ""
        name = f"{self.policy.model}/{version}"
        return (
            f"{name} has {count} of {wanted} approvals by others than {known.actor}, who registered it "
            f'(`edgeopt approve {name} --reason "…"`)'
        )

    def _labels(self, seen: Candidate) -> dict[str, str]:
        chosen = label(seen.snapshot.params)  # tells versions of one study apart, which the names of steps do not
        return {
            **self.policy.tags,
            **{key: seen.run_tags[key] for key in _INHERITED if key in seen.run_tags},
            **({tags.RECIPE: chosen} if chosen else {}),
            tags.STUDY: self.study,
            tags.TRIAL: f"{self.study}/{seen.snapshot.number}",
            "edgeopt.policy": self.policy.name,
        }

    def _versions(self, seen: Candidate) -> list[ModelVersion]:
        """The versions of this run and engine."""
        found = self.desk.client.search_model_versions(f"name = '{self.policy.model}' and run_id = '{seen.run_id}'")
        digest = seen.run_tags.get(tags.ENGINE_DIGEST)
        return [version for version in found if version.tags.get(tags.ENGINE_DIGEST) == digest]

    def _known(self, seen: Candidate) -> str:
        return next((str(version.version) for version in self._versions(seen)), "")

    def _ensure_version(self, seen: Candidate, text: str) -> tuple[ModelVersion, bool]:
        """The version of this run and engine, with tags and description up to date; and whether it was made now."""
        client, model = self.desk.client, self.policy.model
        labels = self._labels(seen)
        known = next(iter(self._versions(seen)), None)
        labels |= self._signature(seen, {} if known is None else known.tags)
        created = known is None
        if known is None:
            known = client.create_model_version(
                model,
                f"models:/{seen.model_id}",
                seen.run_id,
                tags={**labels, **self.desk.mark},
                description=text,
                model_id=seen.model_id,
            )
        else:
            if known.description != text:
                client.update_model_version(model, known.version, text)
            for key, value in labels.items():
                if known.tags.get(key) != value:
                    client.set_model_version_tag(model, known.version, key, value)
        link(client, known, seen.model_id)
        return known, created

    def _signature(self, seen: Candidate, known: Mapping[str, str]) -> dict[str, str]:
        """The tag with the signature that the version has or gets; GateError where the policy's key did not sign."""
        signed = known.get(signature.TAG, "")
        if not signed and self.private_key is not None:
            signed = signature.sign(seen.engine(), self.private_key)
        if self.policy.public_key is not None:
            signature.verify(seen.engine(), signed, self.policy.public_key)
        return {signature.TAG: signed} if signed else {}

"""Register the front of a study as versions of one model and set its aliases by a release policy."""

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
from edgeopt.release.ledger.events import Judged
from edgeopt.release.ledger.operation import MODEL_DESCRIPTION, ReleaseOperation, link_model_version
from edgeopt.release.policy import Policy, find_file
from edgeopt.release.registry import client as registry
from edgeopt.release.run_gates import GateResults, run_gates
from edgeopt.release.webhook import Webhooks

_COPIED_RUN_TAGS = (
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
    """One trial of the front after a promotion.

    Attributes:
        number: number of the trial.
        version: number of its version; empty if it is not registered.
        created: True if this promotion registered it.
    """

    number: int
    run_id: str
    version: str
    created: bool
    aliases: tuple[str, ...]
    gates: tuple[GateVerdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """Result of a promotion or of a dry run.

    Attributes:
        aliases: alias of the policy to version; a version that a dry run would create is empty.
        moved: alias that changed to its version before; None for a new alias.
        dry_run: True if nothing was changed.
    """

    model: str
    releases: tuple[Release, ...]
    aliases: Mapping[str, str]
    moved: Mapping[str, str | None]
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON data."""
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
        config_dir: the user's config folder; its `registry` folder may contain a model card.
        private_key: path of the key that signs the registered engines.
        secret: secret that signs the messages to the policy's webhooks.
        remeasure: function that measures an engine on this machine, for gates that need it.
        dry_run: run the gates and change nothing; refusals are returned, not raised.

    Raises:
        InfeasibleError: the front is empty.
        GateError: a gate refused; the message contains every refusal.
        TrackingError: MLflow failed.
    """
    if not snapshot.front:
        raise InfeasibleError(
            f"no trial of study {snapshot.study!r} satisfies every limit, so nothing is promoted",
            location="limits",
            hint="`edgeopt front` shows how far each trial exceeds its limits: search longer, or set wider limits",
        )
    study = snapshot.study
    with registry.connect(tracking_uri) as client, tempfile.TemporaryDirectory() as scratch:
        operation = ReleaseOperation(client, policy.model, progress)
        promoter = _Promoter(operation, policy, study, private_key)
        check_front = partial(
            run_gates,
            operation,
            policy,
            snapshot.front,
            snapshot.limits,
            Path(scratch),
            private_key=private_key,
            remeasure=remeasure,
        )
        if dry_run:
            return promoter.plan(check_front())
        template = find_file("model_card.md.j2", config_dir)
        webhooks = Webhooks(urls=policy.webhooks, secret=secret)
        with operation.run("promotion", reason, study=study, policy=policy.name, webhooks=policy.webhooks):
            results = check_front()
            promoter.require(results)
            cards = [
                model_card.render(
                    template, result.candidate, study=study, model=policy.model, objectives=snapshot.objectives
                )
                for result in results
            ]
            promotion = promoter.release(results, cards)
        webhooks.deliver(operation)
        return promotion


@dataclass(frozen=True, slots=True)
class _Promoter:
    """Register the candidates of one promotion and move the aliases."""

    operation: ReleaseOperation
    policy: Policy
    study: str
    private_key: Path | None

    def require(self, results: Sequence[GateResults]) -> None:
        """Record all verdicts in the ledger. Raises GateError with every refusal."""
        verdicts = {
            str(result.number): tuple((v.gate, v.passed, v.evidence[:500]) for v in result.verdicts)
            for result in results
        }
        self.operation.append(Judged(policy=self.policy.name, verdicts=verdicts))
        refusals = [refusal for result in results for refusal in result.refusals]
        if refusals:
            raise GateError(
                f"nothing was promoted, {len(refusals)} refused: {'; '.join(refusals)}",
                location=f"registry policy {self.policy.name}",
            )

    def release(self, results: Sequence[GateResults], cards: Sequence[str]) -> Promotion:
        """Register all candidates and move the aliases.

        Raises ApprovalPendingError, after registering, if a version with an alias lacks approvals.
        """
        registry.ensure_model(self.operation.client, self.policy.model, MODEL_DESCRIPTION)
        releases = []
        for result, card in zip(results, cards, strict=True):
            self.operation.progress(f"registering trial {result.number}")
            version, created = self._ensure_version(result.candidate, card)
            self.operation.register(version)
            releases.append(_release(result, str(version.version), created=created))
        aliases = {alias: release.version for release in releases for alias in release.aliases}
        missing = [text for alias in aliases if (text := self._missing_approvals(alias, aliases[alias]))]
        if missing:
            names = ", ".join(f"{self.policy.model}/{release.version}" for release in releases)
            raise ApprovalPendingError(
                f"registered and waiting for approval: {names}. No alias moved: {'; '.join(dict.fromkeys(missing))}",
                location=f"registry policy {self.policy.name}",
                hint="Promote again after the approval",
            )
        moved = self.operation.move(aliases)
        self.operation.retire(self._versions_to_retire(releases))
        return Promotion(model=self.policy.model, releases=tuple(releases), aliases=aliases, moved=moved)

    def plan(self, results: Sequence[GateResults]) -> Promotion:
        """Return what `release` would do, without changing anything."""
        releases = [_release(result, self._existing_version(result.candidate), created=False) for result in results]
        aliases = {alias: release.version for release in releases for alias in release.aliases}
        present = registry.aliases(self.operation.client, self.policy.model)
        moved = {
            alias: present.get(alias)
            for alias, version in aliases.items()
            if present.get(alias) != version or not version
        }
        return Promotion(model=self.policy.model, releases=tuple(releases), aliases=aliases, moved=moved, dry_run=True)

    def _versions_to_retire(self, releases: Sequence[Release]) -> list[str]:
        """Return the versions of earlier fronts without an alias that exceed the policy's number, the oldest first."""
        if self.policy.versions_kept is None:
            return []
        history = self.operation.history
        in_use = {release.version for release in releases} | set(history.aliases.values())
        unused = sorted((v for v in history.registrations if v not in in_use), key=int)
        return unused[: max(0, len(unused) - self.policy.versions_kept)]

    def _missing_approvals(self, alias: str, version: str) -> str:
        """Return which approvals `version` needs before `alias` may point at it; empty if it needs none."""
        history = self.operation.history
        if history.aliases.get(alias) == version:
            return ""
        registration = history.registrations[version]
        approvers = history.approvers(version, registration.digest) - {registration.actor}
        if len(approvers) >= self.policy.approvals:
            return ""
        name = f"{self.policy.model}/{version}"
        return (
            f"{name} has {len(approvers)} of {self.policy.approvals} approvals by users other than "
            f'{registration.actor}, who registered it (`edgeopt approve {name} --reason "…"`)'
        )

    def _version_tags(self, candidate: Candidate) -> dict[str, str]:
        recipe = label(candidate.snapshot.params)  # versions of one study differ in these, not in the names of steps
        return {
            **self.policy.tags,
            **{key: candidate.run_tags[key] for key in _COPIED_RUN_TAGS if key in candidate.run_tags},
            **({tags.RECIPE: recipe} if recipe else {}),
            tags.STUDY: self.study,
            tags.TRIAL: f"{self.study}/{candidate.snapshot.number}",
            "edgeopt.policy": self.policy.name,
        }

    def _find_versions(self, candidate: Candidate) -> list[ModelVersion]:
        """Return the versions with the candidate's run and engine."""
        query = f"name = '{self.policy.model}' and run_id = '{candidate.run_id}'"
        digest = candidate.run_tags.get(tags.ENGINE_DIGEST)
        return [
            version
            for version in self.operation.client.search_model_versions(query)
            if version.tags.get(tags.ENGINE_DIGEST) == digest
        ]

    def _existing_version(self, candidate: Candidate) -> str:
        return next((str(version.version) for version in self._find_versions(candidate)), "")

    def _ensure_version(self, candidate: Candidate, card: str) -> tuple[ModelVersion, bool]:
        """Return the candidate's version with current tags and description, and True if it was created."""
        client, model = self.operation.client, self.policy.model
        version_tags = self._version_tags(candidate)
        version = next(iter(self._find_versions(candidate)), None)
        version_tags |= self._signature_tag(candidate, {} if version is None else version.tags)
        created = version is None
        if version is None:
            version = client.create_model_version(
                model,
                f"models:/{candidate.model_id}",
                candidate.run_id,
                tags={**version_tags, **self.operation.version_tags},
                description=card,
                model_id=candidate.model_id,
            )
        else:
            if version.description != card:
                client.update_model_version(model, version.version, card)
            for key, value in version_tags.items():
                if version.tags.get(key) != value:
                    client.set_model_version_tag(model, version.version, key, value)
        link_model_version(client, version, candidate.model_id)
        return version, created

    def _signature_tag(self, candidate: Candidate, version_tags: Mapping[str, str]) -> dict[str, str]:
        """Return the tag with the existing or a new signature. Raises GateError unless the policy's key signed."""
        text = version_tags.get(signature.TAG, "")
        if not text and self.private_key is not None:
            text = signature.sign(candidate.engine(), self.private_key)
        if self.policy.public_key is not None:
            signature.verify(candidate.engine(), text, self.policy.public_key)
        return {signature.TAG: text} if text else {}


def _release(result: GateResults, version: str, *, created: bool) -> Release:
    return Release(
        number=result.number,
        run_id=result.candidate.run_id,
        version=version,
        created=created,
        aliases=result.candidate.aliases,
        gates=result.verdicts,
    )

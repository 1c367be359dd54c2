"""Store the trials, results and workers of a study in SQLite or PostgreSQL.

Every change is one short transaction. Its first statement increments the revision of the study, which locks the study
until the commit. Later changes therefore have higher revisions, readers fetch only the trials changed since a revision,
and a killed process leaves no partial change. Clocks of different machines are never compared: a worker is dead when
its heartbeat counter has not changed for the length of a lease on the observer's clock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from edgeopt.core.config_objects import digest
from edgeopt.core.study_snapshot import TrialState
from edgeopt.errors import ConfigError
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.database import StudyDatabase, now_s
from edgeopt.search.storage.schema import RESULTS, STUDIES, TRIALS, WORKERS
from edgeopt.search.storage.study_definition import describe_changes
from edgeopt.search.storage.trial import ENDED_STATES, Origin, Trial
from edgeopt.search.storage.trial_summary import TrialSummary
from edgeopt.search.storage.worker_record import WorkerRecord

T = TypeVar("T")


class TrialStorage:
    """Storage of one study.

    Every method raises StoreError if the database cannot be used.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER@HOST/DATABASE`.
        study: name of the study.
        on_message: receives one line when the database does not answer and the transaction is retried.
    """

    def __init__(self, url: str, study: str, *, on_message: Callable[[str], None] = lambda _: None) -> None:
        self.url, self.study = url, study
        self._database = StudyDatabase(url, on_message)
        self._in_study = TRIALS.c.study == study

    # study

    def open(self, definition: Mapping[str, Any], sweep_info: Mapping[str, Any]) -> None:
        """Create the study, or continue it if it exists.

        Args:
            definition: objectives, limits and parameters. They cannot change during a study.
            sweep_info: data from which another worker opens the study. It updates the stored data.

        Raises:
            ConfigError: the stored study has another definition. The error lists the differences.
        """
        new_definition = json.loads(json.dumps(definition))

        def transaction(connection: Connection) -> None:
            stored = connection.execute(sql.select(STUDIES).where(STUDIES.c.study == self.study)).one_or_none()
            now = now_s(connection)
            if stored is None:
                values = {"study": self.study, "revision": 0, "definition": json.dumps(new_definition)}
                connection.execute(sql.insert(STUDIES).values(**values, sweep=json.dumps(sweep_info), opened_s=now))
                return
            self._require_same_definition(json.loads(stored.definition), new_definition)
            updated = {"sweep": json.dumps({**json.loads(stored.sweep), **sweep_info}), "opened_s": now}
            connection.execute(sql.update(STUDIES).where(STUDIES.c.study == self.study).values(**updated))

        try:
            self._database.transact(transaction, create=True)
        except IntegrityError:  # another process created the study at the same time
            self._database.transact(transaction)

    def _require_same_definition(self, stored: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changes = describe_changes(stored, new)
        if changes:
            raise ConfigError(
                f"study {self.study!r} already exists with another definition: {'; '.join(changes)}",
                location="search.study",
                hint="Start a new study with search.study=NAME, or restore the stored values to continue this one",
            )

    def update_sweep_info(self, **values: Any) -> None:
        """Add values to the data from which other workers open the study."""

        def transaction(connection: Connection, revision: int) -> None:
            study = STUDIES.c.study == self.study
            stored = json.loads(connection.execute(sql.select(STUDIES.c.sweep).where(study)).scalar_one())
            connection.execute(sql.update(STUDIES).where(study).values(sweep=json.dumps(stored | values)))

        self._change(transaction)

    # trials

    def trials_since(self, revision: int) -> list[Trial]:
        """Return the trials changed after a revision, by number; 0 returns all trials."""
        query = sql.select(TRIALS).where(self._in_study, TRIALS.c.revision > revision).order_by(TRIALS.c.number)
        rows = self._database.transact(lambda connection: connection.execute(query).all())
        return [Trial.from_row(row) for row in rows]

    def add(
        self,
        params: Params,
        *,
        origin: Origin,
        worker: str = "",
        state: TrialState = "waiting",
        sampler_attrs: Mapping[str, Any] | None = None,
        summary: TrialSummary | None = None,
        result: Mapping[str, Any] | None = None,
        budget: int | None = None,
    ) -> Trial | None:
        """Add a trial and return it.

        Return None if the study has a trial with these parameters, or if `budget` trials that are not refused exist
        and this one is not refused either.

        Args:
            worker: owner of the trial; empty for a trial that waits.
            summary: summary of `result`.
            result: result of a trial that ends without evaluation.
        """

        def transaction(connection: Connection, revision: int) -> Trial | None:
            key = digest(params)
            known = connection.execute(sql.select(TRIALS).where(self._in_study, TRIALS.c.digest == key)).one_or_none()
            if known is not None:
                # a retry after a lost answer finds the trial that the first run added
                is_retry = worker and known.worker == worker and known.attempt == 1 and known.state == state
                return Trial.from_row(known) if is_retry else None
            if budget is not None and state != "refused":
                started = sql.select(sql.func.count()).where(self._in_study, TRIALS.c.state != "refused")
                if connection.execute(started).scalar_one() >= budget:
                    return None
            last = connection.execute(sql.select(sql.func.max(TRIALS.c.number)).where(self._in_study)).scalar()
            number = 0 if last is None else int(last) + 1
            values = {
                "study": self.study,
                "number": number,
                "digest": key,
                "revision": revision,
                "state": state,
                "origin": origin,
                "attempt": 1,
                "worker": worker,
                "built": 0,
                "recorded": 0,
                "run_id": "",
                "ended_s": now_s(connection) if state in ENDED_STATES else None,
                "params": json.dumps(params),
                "hints": json.dumps(sampler_attrs or {}),
                "summary": None if summary is None else summary.to_json(),
            }
            connection.execute(sql.insert(TRIALS).values(**values))
            if result is not None:
                self._store_result(connection, number, result)
            return self._load_trial(connection, number)

        return self._change(transaction)

    def claim(self, worker: str, *, built: bool | None = None) -> Trial | None:
        """Set the first waiting trial to running by `worker` and return it; return None if none waits.

        Args:
            built: True for trials whose engine is built, False for those without an engine, None for both.
        """

        def transaction(connection: Connection, revision: int) -> Trial | None:
            own = sql.select(TRIALS.c.number).where(
                self._in_study, TRIALS.c.state == "running", TRIALS.c.worker == worker
            )
            claimed = connection.execute(own).scalar()
            if claimed is not None:  # a retry after a lost answer
                return self._load_trial(connection, claimed)
            waiting = sql.select(TRIALS.c.number).where(self._in_study, TRIALS.c.state == "waiting")
            if built is not None:
                waiting = waiting.where(TRIALS.c.built == int(built))
            number = connection.execute(waiting.order_by(TRIALS.c.number).limit(1)).scalar()
            if number is None:
                return None
            self._update_trial(connection, revision, number, state="running", worker=worker)
            return self._load_trial(connection, number)

        return self._change(transaction)

    def finish(self, trial: Trial, state: TrialState, summary: TrialSummary, result: Mapping[str, Any]) -> bool:
        """Store the result of a running trial. Return False if `trial.worker` does not own this attempt any more."""

        def transaction(connection: Connection, revision: int) -> bool:
            stored = self._load_trial(connection, trial.number)
            if stored.worker != trial.worker or stored.attempt != trial.attempt:
                return False
            if stored.state != "running":  # a retry after a lost answer
                return stored.state == state
            self._update_trial(
                connection, revision, trial.number, state=state, summary=summary.to_json(), ended_s=now_s(connection)
            )
            self._store_result(connection, trial.number, result)
            return True

        return self._change(transaction)

    def release(self, trial: Trial, *, built: bool = False) -> bool:
        """Set a running trial to waiting. Return False if `trial.worker` does not own this attempt any more.

        Args:
            built: True if its engine is built and another worker measures it. Otherwise the next attempt starts.
        """

        def transaction(connection: Connection, revision: int) -> bool:
            stored = self._load_trial(connection, trial.number)
            if (stored.state, stored.worker, stored.attempt) != ("running", trial.worker, trial.attempt):
                return False
            changes = {"built": 1} if built else trial.next_attempt
            self._update_trial(connection, revision, trial.number, state="waiting", **changes)
            return True

        return self._change(transaction)

    def mark_recorded(self, trial: Trial, *, run_id: str) -> None:
        """Store the MLflow run that holds the complete result of this attempt of an ended trial."""

        def transaction(connection: Connection, revision: int) -> None:
            stored = self._load_trial(connection, trial.number)
            if stored.attempt == trial.attempt and stored.state in ENDED_STATES:
                self._update_trial(connection, revision, trial.number, run_id=run_id, recorded=1)

        self._change(transaction)

    def discard_result(self, trial: Trial) -> None:
        """Delete the result of an ended trial and queue its next attempt."""

        def transaction(connection: Connection, revision: int) -> None:
            if self._load_trial(connection, trial.number).attempt == trial.attempt:
                self._delete_result(connection, trial.number)
                changes = {"built": 0, "summary": None, "ended_s": None, **trial.next_attempt}
                self._update_trial(connection, revision, trial.number, state="waiting", **changes)

        self._change(transaction)

    def load_result(self, number: int) -> dict[str, Any]:
        """Return the complete result of an ended trial."""
        query = sql.select(RESULTS.c.result).where(RESULTS.c.study == self.study, RESULTS.c.number == number)
        text: str = self._database.transact(lambda connection: connection.execute(query).scalar_one())
        result: dict[str, Any] = json.loads(text)
        return result

    # workers

    def register_worker(self, worker: WorkerRecord, *, dead: Container[str] = ()) -> None:
        """Register a worker.

        Raises ConfigError if an active worker that is not in `dead` runs other code: results would not be comparable.
        """

        def transaction(connection: Connection, revision: int) -> None:
            for other in self._load_active_workers(connection):
                if other.code != worker.code and other.worker not in dead:
                    raise ConfigError(
                        f"all workers of study {self.study!r} must run the same code: worker {other.worker} runs "
                        f"{other.code}, this one runs {worker.code}",
                        location="search.study",
                        hint="Install the same version of edgeopt, or wait until the other workers end",
                    )
            known = sql.select(WORKERS.c.worker).where(WORKERS.c.worker == worker.worker)
            if connection.execute(known).scalar() is None:
                connection.execute(sql.insert(WORKERS).values(**asdict(worker), study=self.study, alive=1))

        self._change(transaction)

    def beat(self, worker: str) -> bool:
        """Increment the heartbeat counter of a worker. Return False if the others consider it dead."""
        alive = sql.update(WORKERS).where(WORKERS.c.worker == worker, WORKERS.c.alive == 1)
        increment = alive.values(beat=WORKERS.c.beat + 1)
        return bool(self._database.transact(lambda connection: connection.execute(increment).rowcount))

    def unregister_worker(self, worker: str) -> None:
        """Mark a worker as ended."""
        update = sql.update(WORKERS).where(WORKERS.c.worker == worker).values(alive=0)
        self._database.transact(lambda connection: connection.execute(update))

    def active_workers(self) -> list[WorkerRecord]:
        """Return the workers that have not ended and are not known to be dead."""
        return self._database.transact(self._load_active_workers)

    def reclaim(
        self,
        dead_worker: WorkerRecord,
        *,
        new_owner: str,
        max_attempts: int,
        summarize_failure: Callable[[Trial], TrialSummary],
    ) -> list[Trial]:
        """Take over the trials of a dead worker and return those that it was running.

        Running trials are queued again, or fail at the last attempt. Ended trials without an MLflow record go to
        `new_owner`. Nothing changes if the worker has sent a heartbeat since `dead_worker` was read.

        Args:
            max_attempts: number of attempts after which a trial fails.
            summarize_failure: returns the summary of a trial that fails.
        """

        def transaction(connection: Connection, revision: int) -> list[Trial]:
            unchanged = sql.update(WORKERS).where(
                WORKERS.c.worker == dead_worker.worker, WORKERS.c.beat == dead_worker.beat, WORKERS.c.alive == 1
            )
            if not connection.execute(unchanged.values(alive=0)).rowcount:
                return []
            owned = sql.select(TRIALS).where(
                self._in_study, TRIALS.c.worker == dead_worker.worker, TRIALS.c.recorded == 0
            )
            interrupted = []
            for trial in map(Trial.from_row, connection.execute(owned).all()):
                if trial.state == "running" and trial.attempt < max_attempts:
                    self._update_trial(connection, revision, trial.number, state="waiting", **trial.next_attempt)
                    interrupted.append(trial)
                elif trial.state == "running":
                    summary = summarize_failure(trial).to_json()
                    failed = {"state": "failed", "summary": summary, "recorded": 1, "ended_s": now_s(connection)}
                    self._update_trial(connection, revision, trial.number, **failed)
                    interrupted.append(trial)
                elif trial.state in ENDED_STATES:
                    self._update_trial(connection, revision, trial.number, worker=new_owner)
            return interrupted

        return self._change(transaction)

    # inside a transaction

    def _change(self, transaction: Callable[[Connection, int], T]) -> T:
        """Run `transaction` with the incremented revision of the study, exclusively for this study.

        `transaction` runs again if the answer of the database is lost, so a second run must return the same answer.
        """
        increment = sql.update(STUDIES).where(STUDIES.c.study == self.study).values(revision=STUDIES.c.revision + 1)

        def exclusive_transaction(connection: Connection) -> T:
            connection.execute(increment)
            current = sql.select(STUDIES.c.revision).where(STUDIES.c.study == self.study)
            return transaction(connection, connection.execute(current).scalar_one())

        return self._database.transact(exclusive_transaction)

    def _load_trial(self, connection: Connection, number: int) -> Trial:
        query = sql.select(TRIALS).where(self._in_study, TRIALS.c.number == number)
        return Trial.from_row(connection.execute(query).one())

    def _update_trial(self, connection: Connection, revision: int, number: int, **values: Any) -> None:
        update = sql.update(TRIALS).where(self._in_study, TRIALS.c.number == number)
        connection.execute(update.values(revision=revision, **values))

    def _store_result(self, connection: Connection, number: int, result: Mapping[str, Any]) -> None:
        self._delete_result(connection, number)
        values = {"study": self.study, "number": number, "result": json.dumps(result)}
        connection.execute(sql.insert(RESULTS).values(**values))

    def _delete_result(self, connection: Connection, number: int) -> None:
        connection.execute(sql.delete(RESULTS).where(RESULTS.c.study == self.study, RESULTS.c.number == number))

    def _load_active_workers(self, connection: Connection) -> list[WorkerRecord]:
        columns = [WORKERS.c[field.name] for field in fields(WorkerRecord)]
        query = sql.select(*columns).where(WORKERS.c.study == self.study, WORKERS.c.alive == 1)
        return [WorkerRecord(**row) for row in connection.execute(query).mappings()]


def list_studies(url: str) -> dict[str, dict[str, Any]]:
    """Return the sweep info of every study in a database, by name, the latest opened last.

    Raises StoreError if the database cannot be used.
    """
    query = sql.select(STUDIES.c.study, STUDIES.c.sweep).order_by(STUDIES.c.opened_s)
    database = StudyDatabase(url, lambda _: None)
    rows = database.transact(lambda connection: connection.execute(query).all(), create=True)
    return {name: json.loads(sweep) for name, sweep in rows}

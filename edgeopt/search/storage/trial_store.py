"""The ledger of studies: which recipe was tried by whom and what came of it, in one SQLite file or in PostgreSQL.

Every change is one short transaction that is alone with its study, because the first thing that it does is to raise
the study's revision. So whatever has a later revision was written later, readers ask for what is new alone, and a
process that dies leaves nothing half done. No two clocks are ever compared: a worker is dead when its counter has
stood still for long enough on the clock of the one who watches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from edgeopt.core.config_objects import digest
from edgeopt.errors import ConfigError
from edgeopt.search.space.parameter import Params
from edgeopt.search.storage.database import StudyStore, now_s
from edgeopt.search.storage.schema import RESULTS, STUDIES, TRIALS, WORKERS
from edgeopt.search.storage.summary import Summary
from edgeopt.search.storage.trial import DONE, Origin, Row, State

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker of a study.

    Attributes:
        host: the running kernel and process namespace, within which process numbers mean the same.
        process: number and start of its process on `host`, which no other process ever has.
        code: version and digest of the code that it runs.
        beat: a counter that it raises as long as it lives.
    """

    worker: str
    host: str
    process: str
    role: str
    code: str
    beat: int


class Ledger:
    """One study in a store.

    Args:
        url: `sqlite:///FILE`, or `postgresql://USER@HOST/DATABASE`.
        tell: hears when the store is silent and is waited for.
    """

    def __init__(self, url: str, study: str, *, tell: Callable[[str], None] = lambda _: None) -> None:
        self.url, self.study = url, study
        self._store = StudyStore(url, tell)
        self._of_study = TRIALS.c.study == study

    # the study itself

    def open(self, definition: Mapping[str, Any], sweep: Mapping[str, Any]) -> None:
        """Begin the study, or go on with it. ConfigError where it was begun with another `definition`.

        `sweep` is what another worker needs to join; the latest is kept, beside what was noted.
        """
        given = json.loads(json.dumps(definition))

        def work(connection: Connection) -> None:
            known = connection.execute(sql.select(STUDIES).where(STUDIES.c.study == self.study)).one_or_none()
            now = now_s(connection)
            if known is None:
                values = {"study": self.study, "revision": 0, "definition": json.dumps(given)}
                connection.execute(sql.insert(STUDIES).values(**values, sweep=json.dumps(sweep), opened_s=now))
                return
            before = json.loads(known.definition)
            changed = [key for key in given if before.get(key) != given[key]]
            if changed:
                raise ConfigError(
                    f"study {self.study!r} was begun with other {' and '.join(changed)}",
                    location="search.study",
                    hint="Give the new sweep a name: search.study=NAME, or undo the change",
                )
            fresh = {"sweep": json.dumps({**json.loads(known.sweep), **sweep}), "opened_s": now}
            connection.execute(sql.update(STUDIES).where(STUDIES.c.study == self.study).values(**fresh))

        try:
            self._store.transact(work, create=True)
        except IntegrityError:  # another process has just begun it
            self._store.transact(work)

    def note(self, **facts: Any) -> None:
        """Keep facts on the study beside what its workers need to join."""

        def work(connection: Connection, revision: int) -> None:
            one = STUDIES.c.study == self.study
            known = json.loads(connection.execute(sql.select(STUDIES.c.sweep).where(one)).scalar_one())
            connection.execute(sql.update(STUDIES).where(one).values(sweep=json.dumps(known | facts)))

        self._change(work)

    # trials

    def changes(self, since: int) -> list[Row]:
        """What was written after the revision `since`, in the order of trials."""
        query = sql.select(TRIALS).where(self._of_study, TRIALS.c.revision > since).order_by(TRIALS.c.number)
        return [Row.read(found) for found in self._store.transact(lambda connection: connection.execute(query).all())]

    def add(
        self,
        params: Params,
        *,
        origin: Origin,
        worker: str = "",
        state: State = "waiting",
        hints: Mapping[str, Any] | None = None,
        summary: Summary | None = None,
        result: Mapping[str, Any] | None = None,
        budget: int | None = None,
    ) -> Row | None:
        """A new trial; None where its recipe was tried before by somebody else. A result may come with it.

        None too where `budget` trials cost work already and this would: others may have begun the last ones meanwhile.
        """

        def work(connection: Connection, revision: int) -> Row | None:
            key = digest(params)
            known = connection.execute(sql.select(TRIALS).where(self._of_study, TRIALS.c.digest == key)).one_or_none()
            if known is not None:  # also where the answer to an earlier call was lost on its way
                mine = worker and known.worker == worker and known.attempt == 1 and known.state == state
                return Row.read(known) if mine else None
            if budget is not None and state != "refused":
                begun = sql.select(sql.func.count()).where(self._of_study, TRIALS.c.state != "refused")
                if connection.execute(begun).scalar_one() >= budget:
                    return None
            last = connection.execute(sql.select(sql.func.max(TRIALS.c.number)).where(self._of_study)).scalar()
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
                "ended_s": now_s(connection) if state in DONE else None,
                "params": json.dumps(params),
                "hints": json.dumps(hints or {}),
                "summary": None if summary is None else summary.to_json(),
            }
            connection.execute(sql.insert(TRIALS).values(**values))
            if result is not None:
                self._keep(connection, number, result)
            return self._read(connection, number)

        return self._change(work)

    def claim(self, worker: str, *, built: bool | None = None) -> Row | None:
        """The first trial that waits, RUNNING from now on by `worker`; None where none waits.

        `built` chooses those whose engine was built, or those whose was not.
        """

        def work(connection: Connection, revision: int) -> Row | None:
            own = sql.select(TRIALS.c.number).where(
                self._of_study, TRIALS.c.state == "running", TRIALS.c.worker == worker
            )
            held = connection.execute(own).scalar()
            if held is not None:  # the answer to an earlier call was lost on its way
                return self._read(connection, held)
            waiting = sql.select(TRIALS.c.number).where(self._of_study, TRIALS.c.state == "waiting")
            if built is not None:
                waiting = waiting.where(TRIALS.c.built == int(built))
            number = connection.execute(waiting.order_by(TRIALS.c.number).limit(1)).scalar()
            if number is None:
                return None
            self._write(connection, revision, number, state="running", worker=worker)
            return self._read(connection, number)

        return self._change(work)

    def finish(self, row: Row, state: State, summary: Summary, result: Mapping[str, Any]) -> bool:
        """Keep the result of a trial; whether it still belonged to the worker that `row` names."""

        def work(connection: Connection, revision: int) -> bool:
            now = self._read(connection, row.number)
            if now.worker != row.worker or now.attempt != row.attempt:
                return False
            if now.state != "running":
                return now.state == state
            ended_s = now_s(connection)
            self._write(connection, revision, row.number, state=state, summary=summary.to_json(), ended_s=ended_s)
            self._keep(connection, row.number, result)
            return True

        return self._change(work)

    def release(self, row: Row, *, built: bool = False) -> bool:
        """Queue a trial which `row`'s worker gives up, or has built for another to measure; whether it was its own."""

        def work(connection: Connection, revision: int) -> bool:
            now = self._read(connection, row.number)
            if (now.state, now.worker, now.attempt) != ("running", row.worker, row.attempt):
                return False
            anew = {"built": 1} if built else row.anew
            self._write(connection, revision, row.number, state="waiting", **anew)
            return True

        return self._change(work)

    def annotate(self, row: Row, *, run_id: str) -> None:
        """Note the run in which a trial that is over was recorded whole."""

        def work(connection: Connection, revision: int) -> None:
            now = self._read(connection, row.number)
            if now.attempt == row.attempt and now.state in DONE:
                self._write(connection, revision, row.number, run_id=run_id, recorded=1)

        self._change(work)

    def forget(self, row: Row) -> None:
        """Queue a trial again whose result cannot be recorded, because its files are gone."""

        def work(connection: Connection, revision: int) -> None:
            if self._read(connection, row.number).attempt == row.attempt:
                self._drop(connection, row.number)
                gone = {"built": 0, "summary": None, "ended_s": None}
                self._write(connection, revision, row.number, state="waiting", **gone, **row.anew)

        self._change(work)

    def result(self, number: int) -> dict[str, Any]:
        """The whole result of a trial that is over."""
        query = sql.select(RESULTS.c.result).where(RESULTS.c.study == self.study, RESULTS.c.number == number)
        found: dict[str, Any] = json.loads(
            self._store.transact(lambda connection: connection.execute(query).scalar_one())
        )
        return found

    # workers

    def join(self, member: Member, *, dead: Container[str] = ()) -> None:
        """Raises ConfigError where a worker that is not `dead` runs other code, whose figures are not comparable."""

        def work(connection: Connection, revision: int) -> None:
            for other in self._members(connection):
                if other.code != member.code and other.worker not in dead:
                    raise ConfigError(
                        f"worker {other.worker} of study {self.study!r} runs {other.code}, and this one {member.code}",
                        location="search.study",
                        hint="Install the same version of edgeopt, or wait until the others are done",
                    )
            known = sql.select(WORKERS.c.worker).where(WORKERS.c.worker == member.worker)
            if connection.execute(known).scalar() is None:
                connection.execute(sql.insert(WORKERS).values(**asdict(member), study=self.study, alive=1))

        self._change(work)

    def beat(self, worker: str) -> bool:
        """Give a sign of life; whether the others take this worker for alive."""
        alive = sql.update(WORKERS).where(WORKERS.c.worker == worker, WORKERS.c.alive == 1)
        counted = alive.values(beat=WORKERS.c.beat + 1)
        return bool(self._store.transact(lambda connection: connection.execute(counted).rowcount))

    def leave(self, worker: str) -> None:
        gone = sql.update(WORKERS).where(WORKERS.c.worker == worker).values(alive=0)
        self._store.transact(lambda connection: connection.execute(gone))

    def members(self) -> list[Member]:
        """Workers that have not left and are not known to be dead."""
        return self._store.transact(self._members)

    def reclaim(
        self, member: Member, *, new_owner: str, attempts: int, given_up: Callable[[Row], Summary]
    ) -> list[Row]:
        """Take what a dead worker left, unless it gave a sign of life meanwhile; the trials that it had at work.

        They are queued again, or failed with `given_up`'s words where they were begun `attempts` times; results that
        it had not recorded are `heir`'s to record.
        """

        def work(connection: Connection, revision: int) -> list[Row]:
            dead = sql.update(WORKERS).where(
                WORKERS.c.worker == member.worker, WORKERS.c.beat == member.beat, WORKERS.c.alive == 1
            )
            if not connection.execute(dead.values(alive=0)).rowcount:
                return []
            left = sql.select(TRIALS).where(self._of_study, TRIALS.c.worker == member.worker)
            lost = []
            for row in map(Row.read, connection.execute(left.where(TRIALS.c.recorded == 0)).all()):
                if row.state == "running" and row.attempt < attempts:
                    self._write(connection, revision, row.number, state="waiting", **row.anew)
                    lost.append(row)
                elif row.state == "running":
                    words = {"summary": given_up(row).to_json(), "recorded": 1, "ended_s": now_s(connection)}
                    self._write(connection, revision, row.number, state="failed", **words)
                    lost.append(row)
                elif row.state in DONE:
                    self._write(connection, revision, row.number, worker=new_owner)
            return lost

        return self._change(work)

    def _members(self, connection: Connection) -> list[Member]:
        columns = [WORKERS.c[field.name] for field in fields(Member)]
        query = sql.select(*columns).where(WORKERS.c.study == self.study, WORKERS.c.alive == 1)
        return [Member(**found) for found in connection.execute(query).mappings()]

    # within one transaction

    def _read(self, connection: Connection, number: int) -> Row:
        query = sql.select(TRIALS).where(self._of_study, TRIALS.c.number == number)
        return Row.read(connection.execute(query).one())

    def _write(self, connection: Connection, revision: int, number: int, **values: Any) -> None:
        row = sql.update(TRIALS).where(self._of_study, TRIALS.c.number == number)
        connection.execute(row.values(revision=revision, **values))

    def _keep(self, connection: Connection, number: int, result: Mapping[str, Any]) -> None:
        self._drop(connection, number)
        values = {"study": self.study, "number": number, "result": json.dumps(result)}
        connection.execute(sql.insert(RESULTS).values(**values))

    def _drop(self, connection: Connection, number: int) -> None:
        connection.execute(sql.delete(RESULTS).where(RESULTS.c.study == self.study, RESULTS.c.number == number))

    def _change(self, work: Callable[[Connection, int], T]) -> T:
        """Do `work` in a transaction that is alone with the study; it may be done again where its answer was lost."""
        raised = sql.update(STUDIES).where(STUDIES.c.study == self.study)
        raised = raised.values(revision=STUDIES.c.revision + 1)

        def alone(connection: Connection) -> T:
            connection.execute(raised)
            current = sql.select(STUDIES.c.revision).where(STUDIES.c.study == self.study)
            return work(connection, connection.execute(current).scalar_one())

        return self._store.transact(alone)


def studies(url: str) -> dict[str, dict[str, Any]]:
    """What `Ledger.open` and `note` kept of every study of a store, the latest last.

    Raises StoreError where none can be read.
    """
    query = sql.select(STUDIES.c.study, STUDIES.c.sweep).order_by(STUDIES.c.opened_s)
    store = StudyStore(url, lambda _: None)
    return {name: json.loads(sweep) for name, sweep in store.transact(lambda c: c.execute(query).all(), create=True)}

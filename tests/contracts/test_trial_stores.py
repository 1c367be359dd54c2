"""What the ledger promises (edgeopt.search.storage.trial_store), held against each store that it knows."""

from __future__ import annotations

import itertools
import json
import math
import random
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import trial_stores
from support.postgresql import Postgres
from support.trial_stores import DEFINITION, STUDY, member, opened, race

from edgeopt.errors import ConfigError, StoreError
from edgeopt.search.storage import database
from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.summary import Held, Summary
from edgeopt.search.storage.trial import DONE, Row
from edgeopt.search.storage.trial_store import Ledger, studies

SUMMARY = Summary(feasible=True, metrics={"m": 0.5}, timings_s={"build": 1.5}, energy_j=2.0)
RESULT = {"recipe": {"text": "int4"}, "measurements": []}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store."""
    if request.param == "sqlite":
        return file_url(tmp_path / "deep" / "studies.db")
    return str(request.getfixturevalue("postgresql").database())


@pytest.fixture
def ledger(url: str) -> Ledger:
    return opened(url)


def added(ledger: Ledger, x: object = 0, worker: str = "", **more: Any) -> Row:
    state = more.pop("state", "running" if worker else "waiting")
    row = ledger.add({"x": x}, origin="sampled", worker=worker, state=state, **more)
    assert row is not None
    return row


def finished(ledger: Ledger, x: object = 0, worker: str = "w") -> Row:
    row = added(ledger, x, worker)
    assert ledger.finish(row, "finished", SUMMARY, RESULT)
    return read(ledger, row.number)


def read(ledger: Ledger, number: int) -> Row:
    return next(row for row in ledger.changes(0) if row.number == number)


def buried(ledger: Ledger, worker: str, *, new_owner: str = "heir", attempts: int = 3) -> Any:
    (dead,) = [m for m in ledger.members() if m.worker == worker]
    return ledger.reclaim(
        dead, new_owner=new_owner, attempts=attempts, given_up=lambda row: Summary(failure=f"{row.attempt} times")
    )


# the study


def test_a_study_is_begun_once_and_gone_on_with(url: str) -> None:
    finished(opened(url))
    again = opened(url)
    assert [row.state for row in again.changes(0)] == ["finished"]
    assert studies(url) == {STUDY: {"name": "sweep"}}


def test_the_latest_words_of_a_sweep_are_kept_and_its_study_is_the_last(url: str) -> None:
    for name in ("a", "b", "a"):
        Ledger(url, name).open(DEFINITION, {"told": "again" if name in studies(url) else "first"})
    assert list(studies(url).items()) == [("b", {"told": "first"}), ("a", {"told": "again"})]


def test_facts_that_were_noted_outlive_the_next_sweep(url: str) -> None:
    ledger = opened(url)
    ledger.note(promoted="tiny")
    ledger.note(promoted="small", by="me")
    assert studies(url)[STUDY] == {"name": "sweep", "promoted": "small", "by": "me"}
    ledger.open(DEFINITION, {"name": "later"})
    assert studies(url)[STUDY] == {"name": "later", "promoted": "small", "by": "me"}


def test_a_store_without_studies_has_none(url: str) -> None:
    assert studies(url) == {}


@pytest.mark.parametrize("changed", [["objectives"], ["limits", "parameters"]])
def test_another_definition_is_refused_by_what_changed(url: str, changed: list[str]) -> None:
    opened(url)
    other = DEFINITION | {key: [["other"]] for key in changed}
    with pytest.raises(ConfigError, match=f"begun with other {' and '.join(changed)}") as caught:
        Ledger(url, STUDY).open(other, {"name": "other"})
    assert caught.value.location == "search.study"
    assert studies(url) == {STUDY: {"name": "sweep"}}, "what is refused changes nothing"


def test_tuples_and_lists_define_the_same_study(url: str) -> None:
    opened(url)
    Ledger(url, STUDY).open(DEFINITION | {"objectives": (("m", "minimize"),)}, {})


def test_studies_of_one_store_do_not_see_each_other(url: str) -> None:
    one, other = opened(url, "one"), opened(url, "other")
    assert [added(one, x).number for x in (1, 2)] == [0, 1]
    assert added(other, 1).number == 0
    assert len(other.changes(0)) == 1
    one.join(member("w"))
    assert other.members() == []


def test_a_study_and_its_tables_are_made_once_however_many_begin_it(url: str) -> None:
    assert race(4, trial_stores.open_at_once, url) == [""] * 4
    assert list(studies(url)) == [STUDY]


# one worker


def test_a_new_trial_is_as_it_was_given(ledger: Ledger) -> None:
    params = {"recipe": "int4", "ratio": 0.1 + 0.2, "bits": 4, "on": True, "none": None, "list": [1, "ä"]}
    row = ledger.add(params, origin="enqueued", hints={"generation": 3})
    assert row == Row(
        number=0,
        params=params,
        state="waiting",
        origin="enqueued",
        attempt=1,
        worker="",
        built=False,
        recorded=False,
        run_id="",
        ended_s=None,
        hints={"generation": 3},
        summary=None,
        revision=1,
    )
    assert list(row.params) == list(params), "parameters keep their order"
    assert ledger.changes(0) == [row]


@pytest.mark.parametrize("state", ["waiting", "running", "refused"])
def test_a_recipe_is_added_once(ledger: Ledger, state: str) -> None:
    added(ledger, 1, "w", state=state)
    assert ledger.add({"x": 1}, origin="spread") is None
    assert ledger.add({"x": 1}, origin="sampled", worker="other", state="running") is None
    assert len(ledger.changes(0)) == 1


@pytest.mark.parametrize("state", ["running", "refused"])
def test_an_add_whose_answer_was_lost_is_answered_again(ledger: Ledger, state: str) -> None:
    first = added(ledger, 1, "w", state=state)
    again = added(ledger, 1, "w", state=state)
    assert again == first


def test_a_result_may_come_with_a_trial(ledger: Ledger) -> None:
    before = time.time()
    row = added(ledger, 1, "w", state="refused", summary=SUMMARY, result=RESULT)
    assert (row.state, row.summary) == ("refused", SUMMARY)
    assert row.ended_s == pytest.approx(before, abs=60)
    assert ledger.result(row.number) == RESULT


def test_the_first_that_waits_is_claimed_and_no_other(ledger: Ledger) -> None:
    for x in range(3):
        added(ledger, x)
    claimed = [ledger.claim(f"w{n}") for n in range(4)]
    assert [row and (row.number, row.worker, row.state) for row in claimed] == [
        (0, "w0", "running"),
        (1, "w1", "running"),
        (2, "w2", "running"),
        None,
    ]


def test_a_claim_whose_answer_was_lost_is_answered_again(ledger: Ledger) -> None:
    added(ledger, 0), added(ledger, 1)
    first, again = ledger.claim("w"), ledger.claim("w")
    assert first is not None
    assert again is not None
    assert again.number == first.number
    assert [row.state for row in ledger.changes(0)] == ["running", "waiting"]


def test_a_built_trial_waits_for_those_who_measure(ledger: Ledger) -> None:
    row = added(ledger, 0, "builder")
    added(ledger, 1)
    assert ledger.release(row, built=True)
    left = read(ledger, 0)
    assert (left.state, left.built, left.attempt) == ("waiting", True, 1), "the attempt goes on"
    (plain, built) = (ledger.claim("builder", built=False), ledger.claim("measurer", built=True))
    assert plain is not None
    assert built is not None
    assert (plain.number, built.number) == (1, 0)
    assert ledger.claim("third", built=True) is None
    assert ledger.claim("third") is None


def test_a_finished_trial_keeps_summary_and_result(ledger: Ledger) -> None:
    before = time.time()
    row = added(ledger, 0, "w")
    assert ledger.finish(row, "stopped", SUMMARY, RESULT)
    now = read(ledger, 0)
    assert (now.state, now.summary, now.recorded) == ("stopped", SUMMARY, False)
    assert now.ended_s == pytest.approx(before, abs=60)
    assert ledger.result(0) == RESULT


def test_a_finish_whose_answer_was_lost_is_answered_again_and_changes_nothing(ledger: Ledger) -> None:
    row = added(ledger, 0, "w")
    assert ledger.finish(row, "finished", SUMMARY, RESULT)
    first = read(ledger, 0)
    assert ledger.finish(row, "finished", Summary(), {})
    assert read(ledger, 0) == first
    assert ledger.result(0) == RESULT
    assert not ledger.finish(row, "failed", SUMMARY, RESULT), "it ended otherwise"


def test_a_trial_that_is_given_up_waits_for_its_next_attempt(ledger: Ledger) -> None:
    row = added(ledger, 0, "w")
    assert ledger.release(row)
    now = read(ledger, 0)
    assert (now.state, now.attempt, now.run_id, now.built) == ("waiting", 2, "", False)
    assert not ledger.release(row), "it is not its own any more"
    assert not ledger.finish(row, "finished", SUMMARY, RESULT)
    again = ledger.claim("other")
    assert again is not None
    assert again.attempt == 2
    assert ledger.finish(again, "finished", SUMMARY, RESULT)


def test_a_run_is_noted_of_a_trial_that_is_over_and_of_its_own_attempt_alone(ledger: Ledger) -> None:
    row = added(ledger, 0, "w")
    ledger.annotate(row, run_id="early")
    assert (read(ledger, 0).run_id, read(ledger, 0).recorded) == ("", False)
    ledger.release(row)
    again = ledger.claim("w") or pytest.fail("it waits")
    ledger.finish(again, "finished", SUMMARY, RESULT)
    ledger.annotate(row, run_id="late")
    assert (read(ledger, 0).run_id, read(ledger, 0).recorded) == ("", False)
    ledger.annotate(again, run_id="r")
    assert (read(ledger, 0).run_id, read(ledger, 0).recorded) == ("r", True)


def test_a_forgotten_trial_is_tried_again_from_the_start(ledger: Ledger) -> None:
    row = added(ledger, 0, "builder")
    ledger.release(row, built=True)
    row = ledger.claim("w", built=True) or pytest.fail("it waits")
    ledger.finish(row, "finished", SUMMARY, RESULT)
    ledger.forget(row)
    now = read(ledger, 0)
    assert (now.state, now.attempt, now.built, now.summary, now.ended_s) == ("waiting", 2, False, None, None)
    with pytest.raises(StoreError):
        ledger.result(0)
    ledger.forget(row)
    assert read(ledger, 0) == now, "twice is once"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 1e308])
def test_every_number_survives(ledger: Ledger, value: float) -> None:
    held = {"m": Held(excess=value, satisfied=False, predicted=True, bound=None)}
    summary = Summary(metrics={"m": value}, predicted={"m": value}, verdicts=held, energy_j=value)
    row = added(ledger, 0, "w")
    ledger.finish(row, "finished", summary, {"value": value})
    assert repr(read(ledger, 0).summary) == repr(summary)
    assert repr(ledger.result(0)) == repr({"value": value})


# news


def test_only_what_is_new_is_told_and_in_order(ledger: Ledger) -> None:
    rows = [added(ledger, x, "w") for x in range(3)]
    seen = max(row.revision for row in ledger.changes(0))
    assert ledger.changes(seen) == []
    for row in (rows[2], rows[0]):
        ledger.finish(row, "finished", SUMMARY, RESULT)
    assert [row.number for row in ledger.changes(seen)] == [0, 2]


class Reader:
    """Knows what it was told, asking for news alone."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.revision = ledger, 0
        self.rows: dict[int, Row] = {}
        self.told: list[tuple[int, int]] = []

    def look(self) -> None:
        for row in self.ledger.changes(self.revision):
            self.told.append((row.number, row.revision))
            self.rows[row.number] = row
        self.revision = max([self.revision, *(row.revision for row in self.rows.values())])


words = st.sampled_from(
    ["add", "start", "claim", "claim built", "finish", "build", "release", "note", "forget", "bury"]
)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_news_together_are_the_state_whatever_was_done(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = file_url(tmp_path / "s.db") if kind == "sqlite" else request.getfixturevalue("postgresql").database()

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(script=st.lists(st.tuples(words, st.integers(0, 1), st.booleans()), max_size=25), seed=st.integers(0, 99))
    def hold(script: list[tuple[str, int, bool]], seed: int) -> None:
        made, chance = opened(url, uuid.uuid4().hex), random.Random(seed)
        reader, generation = Reader(made), itertools.count()
        names = [f"{next(generation)}-{made.study}" for _ in range(2)]
        for name in names:
            made.join(member(name))
        for word, who, look in script:
            act(made, word, names, who, chance, generation)
            require_sound(made.changes(0))
            if look:
                reader.look()
        reader.look()
        assert sorted(reader.rows.items()) == [(row.number, row) for row in made.changes(0)]
        assert len(reader.told) == len(set(reader.told)), "no change is told twice"

    hold()


def act(
    ledger: Ledger, word: str, names: list[str], who: int, chance: random.Random, generation: Iterator[int]
) -> None:
    rows, worker = ledger.changes(0), names[who]
    own = next((row for row in rows if row.state == "running" and row.worker == worker), None)
    x = chance.randrange(6)
    match word:
        case "add":
            row = ledger.add({"x": x}, origin="enqueued")
            assert (row is None) == any(r.params == {"x": x} for r in rows)
        case "start" if own is None:
            ledger.add({"x": x}, origin="sampled", worker=worker, state="running")
        case "claim":
            row = ledger.claim(worker)
            assert (row is None) == (own is None and not any(r.state == "waiting" for r in rows))
        case "claim built":
            row = ledger.claim(worker, built=True)
            assert (row is None) == (own is None and not any(r.state == "waiting" and r.built for r in rows))
        case "finish" if own is not None:
            assert ledger.finish(own, "finished", SUMMARY, RESULT)
        case "build" | "release" if own is not None:
            assert ledger.release(own, built=word == "build")
        case "note" if rows:
            noted = chance.choice(rows)
            ledger.annotate(noted, run_id=f"{noted.number}/{noted.attempt}")
        case "forget" if rows:
            done = [row for row in rows if row.state in DONE]
            if done:
                ledger.forget(chance.choice(done))
        case "bury":
            lost = buried(ledger, worker, new_owner=names[1 - who])
            assert [row.number for row in lost] == ([] if own is None else [own.number])
            assert (own is None) or not ledger.finish(own, "finished", SUMMARY, RESULT)
            names[who] = f"{next(generation)}-{ledger.study}"
            ledger.join(member(names[who]))


def require_sound(rows: list[Row]) -> None:
    assert [row.number for row in rows] == list(range(len(rows)))
    assert len({json.dumps(row.params) for row in rows}) == len(rows)
    at_work = [row.worker for row in rows if row.state == "running"]
    assert len(at_work) == len(set(at_work)), "a worker has one trial"
    for row in rows:
        assert (row.summary is not None) == (row.ended_s is not None) == (row.state in DONE)
        assert not row.run_id or row.run_id == f"{row.number}/{row.attempt}"


# many processes


def test_a_recipe_is_added_once_however_many_try(url: str) -> None:
    opened(url)
    reader, recipes = Reader(Ledger(url, STUDY)), 40
    with looking(reader):
        answers = race(4, trial_stores.add_all, url, recipes)
    assert sorted(x for mine in answers for x in mine) == list(range(recipes))
    rows = opened(url).changes(0)
    assert [row.number for row in rows] == list(range(recipes))
    assert sorted(row.params["x"] for row in rows) == list(range(recipes))
    require_seen_once(reader, rows)


def test_a_budget_is_not_exceeded_however_many_try_and_what_is_refused_costs_nothing_of_it(url: str) -> None:
    made = opened(url)
    for x in (-1, -2):
        added(made, x, state="refused")
    answers = race(4, trial_stores.add_all, url, 40, 15)
    assert len(list(itertools.chain(*answers))) == 15
    assert len(made.changes(0)) == 17


def test_a_trial_is_claimed_by_one_however_many_try(url: str) -> None:
    made, count = opened(url), 40
    for x in range(count):
        added(made, x)
    reader = Reader(Ledger(url, STUDY))
    with looking(reader):
        answers = race(4, trial_stores.work_off, url)
    assert sorted(itertools.chain(*answers)) == list(range(count))
    by = {number: n for n in range(4) for number in answers[n]}
    assert len(by) == count
    rows = made.changes(0)
    assert {row.state for row in rows} == {"finished"}
    for row in rows:
        assert made.result(row.number) == {"by": int(row.worker[1:])}
    require_seen_once(reader, rows)


@contextmanager
def looking(reader: Reader) -> Iterator[None]:
    """The reader looks all the time while the block runs, and once after it."""
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.002):
            reader.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        reader.look()


def require_seen_once(reader: Reader, rows: list[Row]) -> None:
    assert sorted(reader.rows.values(), key=lambda row: row.number) == rows
    assert len(reader.told) == len(set(reader.told))


# workers


def test_members_are_those_who_joined_and_have_not_left(ledger: Ledger) -> None:
    one, two = member("one"), member("two", role="build")
    for each in (one, two, one):  # the second time its answer was lost
        ledger.join(each)
    assert sorted(ledger.members(), key=lambda m: m.worker) == [one, two]
    ledger.leave("one")
    assert ledger.members() == [two]
    assert not ledger.beat("one"), "who has left is not alive"


def test_a_beat_raises_the_counter_of_one_worker_and_tells_nothing_new(ledger: Ledger) -> None:
    for name in ("one", "two"):
        ledger.join(member(name))
    seen = ledger.changes(0)
    assert [ledger.beat("two") for _ in range(3)] == [True] * 3
    assert {m.worker: m.beat for m in ledger.members()} == {"one": 0, "two": 3}
    assert ledger.changes(0) == seen
    assert not ledger.beat("unknown")


def test_other_code_joins_only_when_those_who_run_it_are_dead(ledger: Ledger) -> None:
    ledger.join(member("old", code="1+a"))
    with pytest.raises(ConfigError, match=r"old of study 's' runs 1\+a, and this one 2\+b"):
        ledger.join(member("new", code="2+b"))
    assert [m.worker for m in ledger.members()] == ["old"]
    ledger.join(member("new", code="2+b"), dead={"old"})
    ledger.leave("old")
    ledger.join(member("newer", code="2+b"))
    assert {m.worker for m in ledger.members()} == {"new", "newer"}


def test_a_dead_worker_leaves_its_trial_to_the_queue_and_its_results_to_the_heir(ledger: Ledger) -> None:
    for name in ("w", "heir"):
        ledger.join(member(name))
    done = finished(ledger, 0, "w")
    told = finished(ledger, 1, "w")
    ledger.annotate(told, run_id="r")
    others = finished(ledger, 2, "heir")
    running = added(ledger, 3, "w")
    assert buried(ledger, "w") == [running]
    assert [m.worker for m in ledger.members()] == ["heir"]
    assert (read(ledger, 3).state, read(ledger, 3).attempt) == ("waiting", 2)
    assert [read(ledger, row.number).worker for row in (done, told)] == ["heir", "w"]
    assert read(ledger, 2) == others


def test_a_worker_taken_for_dead_is_refused_what_it_brings(ledger: Ledger) -> None:
    ledger.join(member("w"))
    row = added(ledger, 0, "w")
    buried(ledger, "w")
    assert not ledger.beat("w")
    assert not ledger.finish(row, "finished", SUMMARY, RESULT)
    assert not ledger.release(row)
    again = ledger.claim("other") or pytest.fail("it waits")
    ledger.annotate(row, run_id="late")
    assert read(ledger, 0) == again
    with pytest.raises(StoreError):
        ledger.result(0)


def test_a_worker_that_gave_a_sign_meanwhile_is_not_buried(ledger: Ledger) -> None:
    ledger.join(member("w"))
    added(ledger, 0, "w")
    (seen,) = ledger.members()
    ledger.beat("w")
    assert ledger.reclaim(seen, new_owner="heir", attempts=3, given_up=lambda _: Summary()) == []
    assert ledger.beat("w")
    assert read(ledger, 0).state == "running"


def test_a_trial_that_was_begun_often_enough_fails_with_its_last_worker(ledger: Ledger) -> None:
    added(ledger, 0)
    for attempt in (1, 2, 3):
        ledger.join(member(f"w{attempt}"))
        row = ledger.claim(f"w{attempt}") or pytest.fail("it waits")
        assert row.attempt == attempt
        buried(ledger, f"w{attempt}", attempts=3)
    now = read(ledger, 0)
    assert (now.state, now.recorded, now.summary) == ("failed", True, Summary(failure="3 times"))
    assert now.ended_s is not None
    ledger.annotate(row, run_id="late")
    assert read(ledger, 0).recorded, "nobody would record it any more"


def test_a_built_trial_outlives_its_builder(ledger: Ledger) -> None:
    ledger.join(member("builder"))
    ledger.release(added(ledger, 0, "builder"), built=True)
    assert buried(ledger, "builder") == []
    assert (read(ledger, 0).state, read(ledger, 0).built, read(ledger, 0).attempt) == ("waiting", True, 1)


# kills


def test_a_kill_leaves_nothing_half_done(url: str) -> None:
    made, chance = opened(url), random.Random(0)
    for n in range(3):
        trial_stores.killed_at_work(url, f"w{n}", chance.uniform(0.05, 0.3))
        rows = made.changes(0)
        assert [row.number for row in rows] == list(range(len(rows)))
        for row in rows:
            assert (row.summary is not None) == (row.state in DONE)
            if row.state == "finished":  # one that was given up has no result
                assert made.result(row.number)["number"] == row.number
            else:
                with pytest.raises(StoreError):
                    made.result(row.number)
        buried(made, f"w{n}")
        assert not [row for row in made.changes(0) if row.state == "running"]
    assert len(rows) > 10


# a store that is silent


def test_a_restart_in_the_middle_is_waited_for_and_loses_and_doubles_nothing(postgresql: Postgres) -> None:
    url, told = postgresql.database(), []
    opened(url)
    end, failures = threading.Event(), []

    def work(n: int) -> None:
        mine = Ledger(url, STUDY, tell=told.append)
        mine.join(member(f"w{n}"))
        try:
            for x in itertools.count():
                if end.is_set():
                    return
                row = mine.add({"x": [n, x]}, origin="sampled", worker=f"w{n}", state="running")
                assert row is not None, "it was added before"
                assert mine.finish(row, "finished", SUMMARY, {"x": [n, x]})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for mode in ("immediate", "fast"):
        time.sleep(0.3)
        postgresql.restart(mode)
    time.sleep(1.0)
    end.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert told, "a person is told that the store is waited for"
    made = opened(url)
    rows = made.changes(0)
    assert [row.number for row in rows] == list(range(len(rows)))
    for n in range(3):
        mine = [row.params["x"][1] for row in rows if row.worker == f"w{n}"]
        assert mine == list(range(len(mine))) != []
    assert {row.state for row in rows} == {"finished"}
    assert [made.result(row.number) for row in rows] == [row.params for row in rows]


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_a_transaction_that_a_restart_cuts_is_done_again_whole(postgresql: Postgres, mode: str) -> None:
    ledger = opened(postgresql.database())
    ledger.join(member("w"))
    row, _ = added(ledger, 0, "w"), finished(ledger, 1, "w")
    restarts = iter([lambda: postgresql.restart(mode)])

    def given_up(row: Row) -> Summary:
        """Called in the middle of the transaction, after the worker was marked dead."""
        next(restarts, lambda: None)()
        return Summary(failure="given up")

    assert ledger.reclaim(ledger.members()[0], new_owner="heir", attempts=1, given_up=given_up) == [row]
    assert next(restarts, None) is None
    assert [(r.state, r.worker) for r in ledger.changes(0)] == [("failed", "w"), ("finished", "heir")]


def test_a_store_that_stays_away_is_one_error_without_its_password(
    postgresql: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE_S", 1.0)
    told: list[str] = []
    url = opened(postgresql.database().replace("edgeopt@", "edgeopt:secret@")).url
    made = Ledger(url, STUDY, tell=told.append)
    assert made.changes(0) == [], "it answers"
    postgresql.stop()
    try:
        started = time.monotonic()
        with pytest.raises(StoreError) as caught:
            added(made)
        assert 1.0 <= time.monotonic() - started < 5
    finally:
        postgresql.start()
    line = str(caught.value)
    assert f"edgeopt:***@127.0.0.1:{postgresql.port}/" in line
    assert "EDGEOPT_STORE" in line
    assert len(told) == 1, "a person is told once, and not at every try"
    assert "secret" not in " ".join([line, *told])
    assert added(made).number == 0, "the same ledger goes on when the store is back"


def test_a_file_that_another_program_locks_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_LOCK_S", 0.1)
    told: list[str] = []
    made = Ledger(opened(file_url(tmp_path / "s.db")).url, STUDY, tell=told.append)
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.5, lambda: other.execute("COMMIT"))
    timer.start()
    assert added(made).number == 0
    timer.join()
    assert any("locked" in line for line in told)


def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    made = opened(file_url(tmp_path / "s.db"))
    added(made)
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    assert len(made.changes(0)) == 1
    assert time.monotonic() - started < 1
    other.close()


UNUSABLE: dict[str, Callable[[Path], str]] = {
    "no folder": lambda folder: f"sqlite:///{folder}/file/s.db",
    "no database": lambda folder: f"sqlite:///{folder}/file",
    "a folder": lambda folder: f"sqlite:///{folder}",
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_a_file_that_cannot_be_used_is_told_at_once(tmp_path: Path, fault: str) -> None:
    (tmp_path / "file").write_text("this is no database " * 100)
    with pytest.raises(StoreError) as caught:
        opened(UNUSABLE[fault](tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "file").read_text().startswith("this is")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "no address"),
        ("studies.db", "no address"),
        ("sqlite+none:///s.db", "no address"),
        ("postgresql://me@host:port/studies", "no address"),
        ("mysql://me@host/studies", "not kept in mysql"),
        ("http://host/studies", "not kept in http"),
        ("sqlite://", "memory"),
        ("sqlite:///:memory:", "memory"),
    ],
)
def test_an_address_of_no_store_is_a_config_error(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        Ledger(url, STUDY)
    assert caught.value.location == "store"
    assert "postgresql://USER@HOST/DATABASE" in str(caught.value)


def test_the_driver_of_postgresql_is_named_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'edgeopt\[postgres\]'"):
        Ledger("postgresql://me@host/studies", STUDY)


def test_an_address_may_name_its_driver(postgresql: Postgres) -> None:
    url = postgresql.database()
    opened(url)
    assert list(studies(url.replace("postgresql:", "postgresql+psycopg:"))) == [STUDY]


def test_a_change_is_a_copy_that_nobody_else_can_alter(ledger: Ledger) -> None:
    row = added(ledger, 0, "w")
    assert replace(row) == row
    row.params["x"] = "altered"
    assert read(ledger, 0).params == {"x": 0}

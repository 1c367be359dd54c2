"""The chain, by itself and in a store."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from edgeopt.errors import GateError
from edgeopt.release.ledger.hash_chain import Entry, Reading, chain
from edgeopt.release.ledger.ledger import Ledger
from edgeopt.release.registry import client as registry


def entry(number: int, previous: str, **facts: Any) -> Entry:
    return Entry(number=number, previous=previous, kind="k", actor="a", at="2026-01-01", reason="", facts=facts)


def written(count: int) -> list[Entry]:
    found: list[Entry] = []
    for index in range(1, count + 1):
        found.append(entry(index, found[-1].digest if found else "", n=index))
    return found


def texts(entries: list[Entry]) -> list[tuple[int, str]]:
    return [(n, json.dumps(e.to_json())) for n, e in enumerate(entries, start=1)]


def test_a_chain_reads_as_it_was_written() -> None:
    entries = written(4)
    assert chain(texts(entries)) == Reading(entries=tuple(entries), faults=(), last=4)
    assert chain([]) == Reading()


def test_who_was_late_is_void_and_no_fault() -> None:
    one, two, three = written(3)
    late = entry(2, one.digest, late=True)
    assert chain(texts([one, two, late, three])).entries == (one, two, three)
    assert chain(texts([one, two, late, three])).faults == ()


@given(count=st.integers(1, 6), data=st.data())
def test_a_deleted_entry_is_found(count: int, data: st.DataObject) -> None:
    kept = texts(written(count + 1))
    gone = data.draw(st.integers(0, count - 1))
    del kept[gone]
    assert f"version {gone + 1} was deleted" in chain(kept).faults


@given(count=st.integers(1, 5), data=st.data())
def test_a_changed_entry_is_found(count: int, data: st.DataObject) -> None:
    entries = written(count)
    index = data.draw(st.integers(0, count - 1))
    field = data.draw(st.sampled_from(["actor", "at", "kind", "reason", "facts", "previous", "place", "digest"]))
    kept = texts(entries)
    document = json.loads(kept[index][1])
    document[field] = data.draw(st.sampled_from(["mallory", {"n": 99}, 7, None]))
    kept[index] = (index + 1, json.dumps(document))
    assert chain(kept).faults


def test_an_entry_that_was_forged_with_its_digest_breaks_what_follows() -> None:
    one, two, three = written(3)
    forged = replace(two, actor="mallory")
    reading = chain(texts([one, forged, three]))
    assert reading.entries == (one, forged)
    assert reading.faults == ("version 3 follows an entry that is not there",)


@given(text=st.text(max_size=60) | st.builds(json.dumps, st.recursive(st.integers() | st.text(), st.lists)))
def test_whatever_is_no_entry_is_a_fault_and_no_crash(text: str) -> None:
    assert len(chain([(1, text)]).faults) == 1


@pytest.fixture
def ledger(store: tuple[str, Any], request: pytest.FixtureRequest) -> Ledger:
    return Ledger(MlflowClient(tracking_uri=store[0]), request.node.name)


def append(ledger: Ledger, seen: Reading, actor: str = "a") -> Reading:
    return ledger.append(seen, kind="k", actor=actor, reason="r", facts={"by": actor}, told="what people read")


def test_entries_are_versions_that_people_can_read(ledger: Ledger) -> None:
    assert ledger.read() == Reading()
    seen = append(ledger, append(ledger, Reading()))
    assert ledger.read() == seen
    assert [e.number for e in seen.entries] == [1, 2]
    versions = registry.versions(ledger.client, ledger.name)
    assert [v.description for v in versions] == ["what people read"] * 2


def test_of_many_who_append_at_once_each_place_has_one_and_the_others_know(ledger: Ledger) -> None:
    start, won, lost = threading.Barrier(6), [], []
    append(ledger, Reading(), "first")

    def work(name: str) -> None:
        start.wait()
        for _ in range(4):
            try:
                seen = append(ledger, ledger.read(), name)
            except GateError:
                lost.append(name)
            else:
                won.append(seen.entries[-1] if seen.entries[-1].actor == name else None)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reading = ledger.read()
    assert reading.faults == ()
    assert len(won) + len(lost) == 24
    assert len(reading.entries) == 1 + len(won)
    assert won


def test_an_entry_that_was_deleted_in_mlflow_is_found(ledger: Ledger, tmp_path: Path) -> None:
    seen = append(ledger, append(ledger, append(ledger, Reading())))
    ledger.client.delete_model_version(ledger.name, "2")
    assert ledger.read().faults[0] == "version 2 was deleted"
    assert len(seen.entries) == 3

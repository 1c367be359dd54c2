"""Test the hash chain, in memory and in a store."""

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
from edgeopt.release.ledger.events import Ended
from edgeopt.release.ledger.hash_chain import Entry, LedgerState, parse_chain
from edgeopt.release.ledger.ledger import Ledger
from edgeopt.release.registry import client as registry


def entry(number: int, previous: str, outcome: str) -> Entry:
    facts = Ended(action="promotion", outcome=outcome).to_json()
    return Entry(number=number, previous=previous, kind="ended", actor="a", at="2026-01-01", reason="", facts=facts)


def chain_of(count: int) -> list[Entry]:
    entries: list[Entry] = []
    for index in range(1, count + 1):
        entries.append(entry(index, entries[-1].digest if entries else "", str(index)))
    return entries


def stored_texts(entries: list[Entry]) -> list[tuple[int, str]]:
    return [(n, json.dumps(e.to_json())) for n, e in enumerate(entries, start=1)]


def test_chain_round_trips() -> None:
    entries = chain_of(4)
    assert parse_chain(stored_texts(entries)) == LedgerState(entries=tuple(entries), problems=(), last_version=4)
    assert parse_chain([]) == LedgerState()


def test_late_entry_is_void() -> None:
    first, second, third = chain_of(3)
    late = entry(2, first.digest, "late")
    assert parse_chain(stored_texts([first, second, late, third])).entries == (first, second, third)
    assert parse_chain(stored_texts([first, second, late, third])).problems == ()


@given(count=st.integers(1, 6), data=st.data())
def test_deleted_entry_is_detected(count: int, data: st.DataObject) -> None:
    texts = stored_texts(chain_of(count + 1))
    deleted = data.draw(st.integers(0, count - 1))
    del texts[deleted]
    assert f"version {deleted + 1} was deleted" in parse_chain(texts).problems


@given(count=st.integers(1, 5), data=st.data())
def test_changed_entry_is_detected(count: int, data: st.DataObject) -> None:
    entries = chain_of(count)
    index = data.draw(st.integers(0, count - 1))
    field = data.draw(st.sampled_from(["actor", "at", "kind", "reason", "facts", "previous", "place", "digest"]))
    texts = stored_texts(entries)
    document = json.loads(texts[index][1])
    document[field] = data.draw(st.sampled_from(["mallory", {"n": 99}, 7, None]))
    texts[index] = (index + 1, json.dumps(document))
    assert parse_chain(texts).problems


def test_forged_entry_breaks_the_next() -> None:
    first, second, third = chain_of(3)
    forged = replace(second, actor="mallory")
    state = parse_chain(stored_texts([first, forged, third]))
    assert state.entries == (first, forged)
    assert state.problems == ("version 3 refers to an entry that does not exist",)


@given(text=st.text(max_size=60) | st.builds(json.dumps, st.recursive(st.integers() | st.text(), st.lists)))
def test_invalid_entry_is_reported(text: str) -> None:
    assert len(parse_chain([(1, text)]).problems) == 1


def test_entry_of_unknown_kind_is_reported() -> None:
    (first,) = chain_of(1)
    unknown = replace(first, kind="deleted")
    assert parse_chain(stored_texts([unknown])).problems[0].startswith("version 1 was changed: the kind must be one of")


@pytest.fixture
def ledger(store: tuple[str, Any], request: pytest.FixtureRequest) -> Ledger:
    return Ledger(MlflowClient(tracking_uri=store[0]), request.node.name)


def append(ledger: Ledger, state: LedgerState, actor: str = "a") -> LedgerState:
    return ledger.append(state, Ended(action="promotion", outcome=actor), actor=actor, reason="r")


def test_entries_are_stored_as_described_versions(ledger: Ledger) -> None:
    assert ledger.read() == LedgerState()
    state = append(ledger, append(ledger, LedgerState()))
    assert ledger.read() == state
    assert [e.number for e in state.entries] == [1, 2]
    versions = registry.versions(ledger.client, ledger.name)
    assert [v.description for v in versions] == ["ended promotion, a: r"] * 2


def test_concurrent_appends_have_one_winner_per_number(ledger: Ledger) -> None:
    barrier, won, lost = threading.Barrier(6), [], []
    append(ledger, LedgerState(), "first")

    def append_entries(name: str) -> None:
        barrier.wait()
        for _ in range(4):
            try:
                state = append(ledger, ledger.read(), name)
            except GateError:
                lost.append(name)
            else:
                won.append(state.entries[-1] if state.entries[-1].actor == name else None)

    threads = [threading.Thread(target=append_entries, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = ledger.read()
    assert state.problems == ()
    assert len(won) + len(lost) == 24
    assert len(state.entries) == 1 + len(won)
    assert won


def test_deletion_in_mlflow_is_detected(ledger: Ledger, tmp_path: Path) -> None:
    state = append(ledger, append(ledger, append(ledger, LedgerState())))
    ledger.client.delete_model_version(ledger.name, "2")
    assert ledger.read().problems[0] == "version 2 was deleted"
    assert len(state.entries) == 3

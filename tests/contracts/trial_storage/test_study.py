"""Contract of TrialStorage on every database: opening studies and choosing the database."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support import trial_storages
from support.postgresql import Postgres
from support.trial_storages import (
    DEFINITION,
    STUDY,
    add_finished_trial,
    add_trial,
    open_study,
    remote_worker,
    run_concurrently,
)

from edgeopt.errors import ConfigError
from edgeopt.search.storage.trial_storage import TrialStorage, list_studies


def test_existing_study_is_continued(url: str) -> None:
    add_finished_trial(open_study(url))
    reopened = open_study(url)
    assert [trial.state for trial in reopened.trials_since(0)] == ["finished"]
    assert list_studies(url) == {STUDY: {"name": "sweep"}}


def test_latest_sweep_info_is_stored(url: str) -> None:
    for name in ("a", "b", "a"):
        TrialStorage(url, name).open(DEFINITION, {"opened": "again" if name in list_studies(url) else "first"})
    assert list(list_studies(url).items()) == [("b", {"opened": "first"}), ("a", {"opened": "again"})]


def test_updated_sweep_info_survives_reopening(url: str) -> None:
    storage = open_study(url)
    storage.update_sweep_info(promoted="tiny")
    storage.update_sweep_info(promoted="small", by="me")
    assert list_studies(url)[STUDY] == {"name": "sweep", "promoted": "small", "by": "me"}
    storage.open(DEFINITION, {"name": "later"})
    assert list_studies(url)[STUDY] == {"name": "later", "promoted": "small", "by": "me"}


def test_empty_database_has_no_studies(url: str) -> None:
    assert list_studies(url) == {}


@pytest.mark.parametrize(
    ("changed", "differences"),
    [
        ({"objectives": [["m", "maximize"]]}, ["objective m: stored minimize, new maximize"]),
        (
            {"limits": [["n", "at most 1"]], "parameters": {"x": {"choices": [2]}}},
            [
                "limit n: stored none, new at most 1",
                'parameter x: stored {"choices": [1]}, new {"choices": [2]}',
            ],
        ),
    ],
)
def test_changed_definition_is_rejected(url: str, changed: dict[str, Any], differences: list[str]) -> None:
    open_study(url)
    with pytest.raises(ConfigError, match="already exists with another definition") as caught:
        TrialStorage(url, STUDY).open(DEFINITION | changed, {"name": "other"})
    assert "; ".join(differences) in str(caught.value)
    assert caught.value.location == "search.study"
    assert list_studies(url) == {STUDY: {"name": "sweep"}}, "a rejected definition changes nothing"


def test_tuples_and_lists_are_equal_definitions(url: str) -> None:
    open_study(url)
    TrialStorage(url, STUDY).open(DEFINITION | {"objectives": (("m", "minimize"),)}, {})


def test_studies_of_one_database_are_separate(url: str) -> None:
    first, second = open_study(url, "first"), open_study(url, "second")
    assert [add_trial(first, x).number for x in (1, 2)] == [0, 1]
    assert add_trial(second, 1).number == 0
    assert len(second.trials_since(0)) == 1
    first.register_worker(remote_worker("w"))
    assert second.active_workers() == []


def test_concurrent_opening_creates_one_study(url: str) -> None:
    assert run_concurrently(4, trial_storages.open_concurrently, url) == [""] * 4
    assert list(list_studies(url)) == [STUDY]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "valid database URL"),
        ("studies.db", "valid database URL"),
        ("sqlite+none:///s.db", "valid database URL"),
        ("postgresql://me@host:port/studies", "valid database URL"),
        ("mysql://me@host/studies", "got mysql"),
        ("http://host/studies", "got http"),
        ("sqlite://", "memory"),
        ("sqlite:///:memory:", "memory"),
    ],
)
def test_unsupported_url_is_rejected(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrialStorage(url, STUDY)
    assert caught.value.location == "store"
    assert "postgresql://USER@HOST/DATABASE" in str(caught.value)


def test_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'edgeopt\[postgres\]'"):
        TrialStorage("postgresql://me@host/studies", STUDY)


def test_url_may_name_the_driver(postgresql: Postgres) -> None:
    url = postgresql.database()
    open_study(url)
    assert list(list_studies(url.replace("postgresql:", "postgresql+psycopg:"))) == [STUDY]


def test_sqlite_folder_is_created(tmp_path: Path) -> None:
    open_study(f"sqlite:///{tmp_path}/new/folder/s.db")
    assert (tmp_path / "new" / "folder" / "s.db").is_file()

"""Check `edgeopt cache`: display, pruning, invalid arguments and protected entries."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support import samples

from edgeopt.cache import StageCache
from edgeopt.cache.eviction import bytes_on_disk, evict, list_entries
from edgeopt.cli.main import main
from edgeopt.config import assemble, compose, trial_process
from edgeopt.core.artifact import Engine
from edgeopt.core.result import TrialResult
from edgeopt.studies.engine import verified_engine

Document = dict[str, Any]
SIZE = 100_000


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(work: Path) -> StageCache:
    """Return a cache with two engines and a measurement, the least recently used first."""
    cache = StageCache(work / ".edgeopt" / "cache")
    for kind, name in (("engine", 1), ("measurement", 1), ("engine", 2)):
        cache.get_or_create(kind, name, create_file)
    return cache


def create_file(folder: Path) -> None:
    (folder / "out").write_bytes(b"x" * SIZE)


def create_engine(folder: Path) -> None:
    folder.rmdir()
    samples.engine(folder)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Document]:
    def run(*arguments: str) -> Document:
        assert main(["cache", *arguments, "--json"]) == 0
        document: Document = json.loads(capsys.readouterr().out)
        return document

    return run


def test_cache_shows_entries_by_kind_and_limit(store: StageCache, command: Callable[..., Document]) -> None:
    document = command()
    assert document["limit_bytes"] == 20 * 2**30
    assert document["entries"] == 3
    assert document["bytes"] == bytes_on_disk(list_entries(store.root)) > 3 * SIZE
    assert {kind["kind"]: kind["entries"] for kind in document["kinds"]} == {"engine": 2, "measurement": 1}
    assert sum(kind["bytes"] for kind in document["kinds"]) == document["bytes"]
    oldest = datetime.fromisoformat(document["kinds"][0]["oldest_use"])
    assert 0 <= (datetime.now(UTC) - oldest).total_seconds() < 60
    assert document["pruned"] is None
    assert command("show", "--state", ".edgeopt")["entries"] == 3, "showing changes nothing"


def test_prune_frees_least_recently_used_entries(store: StageCache, command: Callable[..., Document]) -> None:
    before = bytes_on_disk(list_entries(store.root))
    document = command("prune", "--to", "250 kB")
    assert document["pruned"]["entries"] == 1
    assert document["pruned"]["freed_bytes"] == before - document["bytes"] > SIZE
    assert document["bytes"] == bytes_on_disk(list_entries(store.root)) <= 250_000
    assert [entry.kind for entry in list_entries(store.root)] == ["measurement", "engine"]


def test_prune_defaults_to_the_configured_limit(
    store: StageCache, work: Path, command: Callable[..., Document], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("prune")["pruned"]["entries"] == 0
    (work / "own").mkdir()
    config = (Path(compose.root("conf")) / "config.yaml").read_text()
    (work / "own" / "config.yaml").write_text(config.replace("20 GiB", "150 kB"))
    document = command("prune", "--config-dir", "own")
    assert (document["limit_bytes"], document["entries"]) == (150_000, 1)
    (work / "own" / "config.yaml").write_text(config.replace("20 GiB", "null"))
    assert command("--config-dir", "own")["limit_bytes"] is None
    assert main(["cache", "prune", "--config-dir", "own"]) == 2
    assert capsys.readouterr().err == "edgeopt: --to: cache.limit is null. Give --to SIZE or --all\n"


def test_prune_all_keeps_entries_in_use(
    store: StageCache, command: Callable[..., Document], capsys: pytest.CaptureFixture[str]
) -> None:
    with store.protect():
        store.get_or_create("engine", 1, lambda _: pytest.fail("the entry is cached"))
        document = command("prune", "--all")
        assert (document["pruned"]["entries"], document["pruned"]["in_use"], document["entries"]) == (2, 1, 1)
        assert document["pruned"]["in_use_bytes"] == document["bytes"] > SIZE
        assert main(["cache", "prune", "--all"]) == 0
        out = capsys.readouterr().out
        assert "pruned: 0 entries, 0.0 MiB freed" in out
        assert "in use, kept: 1 entries, 0.1 MiB" in out
    assert command("prune", "--all")["entries"] == 0


def test_prune_kind_removes_only_that_kind(store: StageCache, command: Callable[..., Document]) -> None:
    document = command("prune", "--kind", "measurement")
    assert document["pruned"]["entries"] == 1
    assert [(kind["kind"], kind["entries"]) for kind in document["kinds"]] == [("engine", 2)]


def test_cache_prints_a_table(store: StageCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert "cache .edgeopt/cache" in out
    assert [word for word in ("engine", "measurement", "total", "MiB", "oldest use") if word not in out] == []
    assert "limit: 20480.0 MiB" in out
    assert "pruned" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--to", "5"], "--to: the value must have a unit, got '5'"),
        (["prune", "--to=-5 GiB"], "--to: the size must not be negative, got '-5 GiB'. Use 0 B or more"),
        (["prune", "--to", "much"], "--to: the value must be a quantity, got 'much'"),
        (["prune", "--to", "5 s"], "--to: the value must have a unit of size, got '5 s'"),
        (["--to", "5 GiB"], "--to: `--to` must be given with prune, got show. Use `edgeopt cache prune`"),
        (["show", "--all"], "--all: `--all` must be given with prune, got show. Use `edgeopt cache prune`"),
        (
            ["prune", "--kind", "x"],
            "--kind: `--kind` must be a kind of entry in the cache, got 'x'",
        ),
        (["--state", "elsewhere"], "elsewhere/cache: there is no cache. Run edgeopt run or sweep first"),
    ],
)
def test_invalid_arguments_free_nothing(
    store: StageCache, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], work: Path
) -> None:
    assert main(["cache", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"edgeopt: {message}")
    assert len(list_entries(store.root)) == 3
    assert not (work / "elsewhere").exists()


# protection from eviction


def test_trial_result_is_protected_until_next_trial(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(_: object, store: StageCache, __: object, **___: object) -> TrialResult:
        store.get_or_create("engine", len(results), create_engine)
        results.append(samples.result())
        return results[-1]

    results: list[TrialResult] = []
    monkeypatch.setattr(trial_process, "build_job", lambda *_: None)
    monkeypatch.setattr(trial_process, "evaluate", evaluate)
    root = work / ".edgeopt" / "cache"
    for number in range(2):
        trial_process.evaluate_trial(assemble.Request(), {}, lambda _: None)
        assert len(evict(root, 0).evicted) == min(number, 1), "only the engine of the previous trial"
        assert len(list_entries(root)) == 1
    trial_process._cache_protection.close()
    assert len(evict(root, 0).evicted) == 1


def test_open_engine_is_not_evicted(store: StageCache) -> None:
    folder = store.get_or_create("engine", "open", create_engine)
    with verified_engine(str(folder)) as (engine, _):
        evict(store.root, 0)
        assert Engine.read(folder).digest == engine.digest
    evict(store.root, 0)
    assert not folder.exists()


@pytest.mark.parametrize("command", [("generate",), ("bench", "--engine")])
def test_evicted_engine_error_names_rebuild_command(
    store: StageCache, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store.get_or_create("engine", 1, lambda _: pytest.fail("the entry is cached"))
    evict(store.root, 0)
    assert main([*command, str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"edgeopt: {folder}: no such folder.")
    assert "`edgeopt run` rebuilds an engine that the cache evicted" in line

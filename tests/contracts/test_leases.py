"""Contract suite of `Lease`: measurements are exclusive, and shared work may overlap."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from edgeopt.core.protocols import Lease, Progress
from edgeopt.machine import device_lease
from edgeopt.machine.postgres_lease import PostgresLease

Acquire = Callable[[Progress], AbstractContextManager[None]]
BLOCKED_S = 0.6
"""A thread that has not acquired the device after this time counts as blocked."""


@dataclass(frozen=True, kw_only=True)
class FileLease:
    """Lease of edgeopt.machine.device_lease with lock files in the test's folder."""

    folder: Path

    def exclusive(self, progress: Progress) -> AbstractContextManager[None]:
        return device_lease.exclusive(progress, self.folder)

    def shared(self, progress: Progress) -> AbstractContextManager[None]:
        return device_lease.shared(progress, self.folder)


@pytest.fixture(params=["files", "database"])
def lease(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lease:
    if request.param == "files":
        return FileLease(folder=tmp_path)
    for mode in ("exclusive", "shared"):  # PostgresLease also acquires the file lease
        monkeypatch.setattr(device_lease, mode, partial(getattr(device_lease, mode), folder=tmp_path))
    return PostgresLease(url=request.getfixturevalue("postgresql").database(), device="d")


class OtherThread:
    """Thread that acquires the device and releases it at once."""

    def __init__(self, acquire: Acquire) -> None:
        self.acquired = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(acquire,))
        self._thread.start()

    def _run(self, acquire: Acquire) -> None:
        with acquire(lambda line: None):
            self.acquired.set()

    def finishes(self) -> bool:
        """Return whether the thread acquired the device within 20 s."""
        self._thread.join(20)
        return self.acquired.is_set()


@pytest.mark.parametrize(
    ("own_mode", "other_mode", "overlap"),
    [
        ("shared", "shared", True),
        ("shared", "exclusive", False),
        ("exclusive", "shared", False),
        ("exclusive", "exclusive", False),
    ],
)
def test_only_shared_holders_overlap(lease: Lease, own_mode: str, other_mode: str, overlap: bool) -> None:
    with getattr(lease, own_mode)(lambda line: None):
        other = OtherThread(getattr(lease, other_mode))
        assert other.acquired.wait(10 if overlap else BLOCKED_S) == overlap
    assert other.finishes()


@pytest.mark.parametrize("outer", ["shared", "exclusive"])
@pytest.mark.parametrize("inner", ["shared", "exclusive"])
def test_nested_lease_never_waits_for_own_thread(lease: Lease, outer: str, inner: str) -> None:
    lines: list[str] = []
    with getattr(lease, outer)(lines.append), getattr(lease, inner)(lines.append):
        assert lines == []


@pytest.mark.parametrize("mode", ["shared", "exclusive"])
def test_error_inside_block_releases_device(lease: Lease, mode: str) -> None:
    with pytest.raises(ZeroDivisionError), getattr(lease, mode)(lambda line: None):
        1 / 0  # noqa: B018
    assert OtherThread(lease.exclusive).finishes()

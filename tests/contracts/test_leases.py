"""What every lease on a device promises."""

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
from edgeopt.machine.postgres_lease import SharedLease

Taking = Callable[[Progress], AbstractContextManager[None]]
GRACE_S = 0.6
"""How long one who must wait is given to show that it does not."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The lease by files, in a folder of the test's own."""

    folder: Path

    def hold(self, progress: Progress) -> AbstractContextManager[None]:
        return device_lease.hold(progress, self.folder)

    def work(self, progress: Progress) -> AbstractContextManager[None]:
        return device_lease.work(progress, self.folder)


@pytest.fixture(params=["files", "database"])
def device(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lease:
    if request.param == "files":
        return Files(folder=tmp_path)
    for take in ("hold", "work"):  # the files inside lie in the test's own folder too
        monkeypatch.setattr(device_lease, take, partial(getattr(device_lease, take), folder=tmp_path))
    return SharedLease(url=request.getfixturevalue("postgresql").database(), device="d")


class Another:
    """Someone else who takes the device for a moment."""

    def __init__(self, take: Taking) -> None:
        self.had = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(take,))
        self._thread.start()

    def _run(self, take: Taking) -> None:
        with take(lambda line: None):
            self.had.set()

    def ends(self) -> bool:
        """Whether they had the device in the end."""
        self._thread.join(20)
        return self.had.is_set()


@pytest.mark.parametrize(
    ("mine", "theirs", "beside"),
    [("work", "work", True), ("work", "hold", False), ("hold", "work", False), ("hold", "hold", False)],
)
def test_only_those_who_work_have_the_device_together(device: Lease, mine: str, theirs: str, beside: bool) -> None:
    with getattr(device, mine)(lambda line: None):
        other = Another(getattr(device, theirs))
        assert other.had.wait(10 if beside else GRACE_S) == beside
    assert other.ends()


@pytest.mark.parametrize("outer", ["work", "hold"])
@pytest.mark.parametrize("inner", ["work", "hold"])
def test_nobody_waits_for_what_the_same_thread_has(device: Lease, outer: str, inner: str) -> None:
    said: list[str] = []
    with getattr(device, outer)(said.append), getattr(device, inner)(said.append):
        assert said == []


@pytest.mark.parametrize("take", ["work", "hold"])
def test_what_fails_inside_leaves_the_device_free(device: Lease, take: str) -> None:
    with pytest.raises(ZeroDivisionError), getattr(device, take)(lambda line: None):
        1 / 0  # noqa: B018
    assert Another(device.hold).ends()

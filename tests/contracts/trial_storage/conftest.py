from __future__ import annotations

from pathlib import Path

import pytest
from support.trial_storages import open_study

from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial_storage import TrialStorage


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        return file_url(tmp_path / "deep" / "studies.db")
    return str(request.getfixturevalue("postgresql").database())


@pytest.fixture
def storage(url: str) -> TrialStorage:
    """Return the storage of a new study."""
    return open_study(url)

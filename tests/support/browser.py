"""Render pages in headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needed = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


def dom(url: str, profile: Path, budget_s: int = 60) -> str:
    """Return the HTML of a page after rendering, at most `budget_s` seconds of the browser's virtual time."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile / 'chromium'}"]
    command += ["--window-size=1600,1200", f"--virtual-time-budget={budget_s * 1000}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

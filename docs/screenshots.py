"""Sweep the reference model and take the pictures of the documentation in headless Chromium.

    PYTHONPATH=. .venv/bin/python docs/screenshots.py [FOLDER]

FOLDER keeps the study, so that a second call only takes the pictures. The sweep takes some minutes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent / "images"
EDGEOPT = [sys.executable, "-m", "edgeopt.cli"]
WIDTH = 1400


def main() -> None:
    """Run the sweep unless the folder holds a study, and take all pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="edgeopt-docs-"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "front.json").is_file():
        (folder / "sweep.txt").write_text(run(folder, "sweep"))
        (folder / "front.json").write_text(run(folder, "front", "--json"))
    front = json.loads((folder / "front.json").read_text())
    port = free_port()
    server = subprocess.Popen([*EDGEOPT, "ui", "--port", str(port)], cwd=folder)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_for(f"{base}/edgeopt/")
        take_pictures(base, front, folder)
    finally:
        server.terminate()
        server.wait(30)


def take_pictures(base: str, front: dict[str, Any], folder: Path) -> None:
    """Write one PNG for each page."""
    runs = {trial["number"]: trial["run_id"] for trial in front["trials"]}
    pair = "&".join(f"run={runs[number]}" for number in (front["front"][0], front["champion"]["trial"]))
    study = study_run(folder, front["study"])
    screenshot(f"{base}/edgeopt/studies/{study}", "study-page.png", 1300, folder)
    screenshot(f"{base}/edgeopt/compare?{pair}", "compare-page.png", 1200, folder)
    screenshot(f"{base}/edgeopt/releases/edgeopt", "release-page.png", 760, folder)


def screenshot(url: str, name: str, height: int, folder: Path) -> None:
    """Save the page at `url` once its scripts have run for 20 seconds of virtual time."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'chromium'}", f"--window-size={WIDTH},{height}"]
    command += ["--virtual-time-budget=20000", f"--screenshot={IMAGES / name}", url]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    print(IMAGES / name)


def run(folder: Path, *arguments: str) -> str:
    """Return what an edgeopt command prints in `folder`."""
    done = subprocess.run([*EDGEOPT, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def study_run(folder: Path, study: str) -> str:
    """Return the MLflow run of a study."""
    from edgeopt.core import mlflow_tags as tags

    query = f"tags.`{tags.STUDY}` = '{study}'"
    runs = _client(folder).search_runs([experiment_of(folder)], query, max_results=1000)
    return next(str(found.info.run_id) for found in runs if tags.TRIAL not in found.data.tags)


def experiment_of(folder: Path) -> str:
    """Return the id of the MLflow experiment `edgeopt`."""
    return str(_client(folder).get_experiment_by_name("edgeopt").experiment_id)


def _client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder.resolve()}/mlflow.db")


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def wait_for(url: str, seconds: float = 120) -> None:
    """Wait until a server answers at `url`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=5)  # noqa: S310  a local address
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"{url} does not answer after {seconds:.0f} s")


if __name__ == "__main__":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    main()

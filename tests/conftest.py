"""What many tests share: a tiny model that needs no network, and real data where a checkout has it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test may reach a hub

import pytest
import requests
from hypothesis import settings

settings.register_profile("edgeopt", deadline=None)  # the cores are shared with measurements
settings.load_profile("edgeopt")

REPOSITORY = Path(__file__).resolve().parent.parent
PROSE = "def read(path):\n    return open(path).read()\n\nThe quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in Hugging Face layout: 2 layers, hidden 64, MLP 128, 4 heads over 2 KV heads, vocabulary 300."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_model")
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings_of_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of_tokenizer))
    return folder


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of an MLflow server that keeps runs and artifacts in a folder of its own."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_until_healthy(uri, folder / "log")
        yield uri
    finally:
        server.terminate()
        server.wait()


def wait_until_healthy(uri: str, log: Path, patience_s: float = 90) -> None:
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        try:
            if requests.get(f"{uri}/health", timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


class Postgres:
    """A PostgreSQL server of the tests' own: databases for the asking, and it may be stopped and started."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries, self._folder = binaries, folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        if os.geteuid() == 0:  # the server refuses to be root
            shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "--username=edgeopt", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        settings_of_server = {
            "port": self.port,
            "listen_addresses": "'127.0.0.1'",
            "unix_socket_directories": "''",
            "fsync": "off",
            "max_connections": 60,
        }
        lines = [f"{key} = {value}\n" for key, value in settings_of_server.items()]
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(lines)

    def database(self) -> str:
        """The address of a new and empty database."""
        import psycopg

        name = f"d{uuid.uuid4().hex[:12]}"
        with psycopg.connect(f"{self._address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return f"{self._address}/{name}"

    def start(self) -> None:
        self._run("pg_ctl", "--wait", "--silent", f"--log={self._folder / 'log'}", "start")

    def stop(self, mode: str = "fast") -> None:
        """`fast` ends what runs with a word; `immediate` is a crash."""
        self._run("pg_ctl", "--wait", "--silent", f"--mode={mode}", "stop")

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    @property
    def _address(self) -> str:
        return f"postgresql://edgeopt@127.0.0.1:{self.port}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), "-D", str(self._folder / "data"), *arguments]
        other = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run(  # type: ignore[call-overload]
            command, cwd=self._folder, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **other
        )
        if done.returncode:
            log = self._folder / "log"
            raise AssertionError(done.stderr.decode() + (log.read_text() if log.exists() else ""))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgres]:
    """A private PostgreSQL server; the tests that want one are skipped where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="its driver is not installed: pip install 'edgeopt[postgres]'")
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2**30
    # not one of pytest's own folders, which are closed to other users
    folder = Path(tempfile.mkdtemp(prefix="edgeopt-postgresql-", dir=memory if roomy else None))
    try:
        server = Postgres(found[-1].parent if found else Path(str(on_path)).parent, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Real models and texts, which lie beside some checkouts and are never downloaded."""
    folder = REPOSITORY.parent / "shared" / "realdata"
    if not folder.is_dir():
        pytest.skip(f"no real models and texts at {folder}")
    return folder

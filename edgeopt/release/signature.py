"""Signatures of engines: over the manifest, which holds the sha256 of every file, with a local key.

They are those of the OpenSSF Model Signing specification (https://github.com/sigstore/model-transparency), so anybody
can check one without edgeopt: `model_signing verify key` on a folder that holds the manifest alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgeopt.core.artifact import MANIFEST, Engine
from edgeopt.errors import ConfigError, GateError, first_line

TAG = "edgeopt.signature"
"""Tag of a registered version: the signature as JSON text."""
KEY = "EDGEOPT_SIGNING_KEY"
"""Environment variable: path of the private key, an elliptic curve's in PEM form."""


def key_of_environment() -> Path | None:
    """Return the path of the private key that the environment names; None if it names none."""
    path = os.environ.get(KEY)
    return Path(path) if path else None


def sign(engine: Engine, private_key: Path) -> str:
    """The signature of an engine's manifest. Raises ConfigError where the key cannot be used."""
    from model_signing import signing

    with _manifest_alone(engine) as folder, tempfile.TemporaryDirectory() as scratch:
        signature = Path(scratch) / "signature.json"
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
            config.sign(folder, signature)
        except (ValueError, TypeError, OSError) as error:  # its text may show the key
            raise ConfigError(
                f"the private key cannot be used ({type(error).__name__})",
                location=str(private_key),
                hint="Give an elliptic curve's key in PEM form, without a password",
            ) from None
        return signature.read_text(encoding="utf-8")


def verify(engine: Engine, signature: str, public_key: Path) -> None:
    """Raises GateError unless `signature` is that of this engine's manifest by the owner of `public_key`."""
    from model_signing import verifying

    with _manifest_alone(engine) as folder, tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "signature.json"
        file.write_text(signature, encoding="utf-8")
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(folder, file)
        except Exception as error:  # whatever the library cannot read is no signature
            raise GateError(
                f"the signature is not that of this engine by the key {public_key.name} ({first_line(error)})",
                location=str(engine.directory),
                hint="Do not use it, and find out who changed it",
            ) from error


@contextlib.contextmanager
def _manifest_alone(engine: Engine) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "engine"
        folder.mkdir()
        shutil.copyfile(engine.directory / MANIFEST, folder / MANIFEST)
        yield folder

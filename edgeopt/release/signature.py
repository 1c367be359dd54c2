"""Sign an engine's manifest, which contains the sha256 of every file, with a local key, and verify signatures.

Signatures follow the OpenSSF Model Signing specification (https://github.com/sigstore/model-transparency). Anybody can
check one without edgeopt: `model_signing verify key` on a folder that contains only the manifest.
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
"""Tag of a registered version that holds the signature as JSON text."""
KEY = "EDGEOPT_SIGNING_KEY"
"""Environment variable with the path of the private key: an elliptic-curve key in PEM format."""


def key_from_environment() -> Path | None:
    """Return the path of the private key that the environment names; None if it names none."""
    path = os.environ.get(KEY)
    return Path(path) if path else None


def sign(engine: Engine, private_key: Path) -> str:
    """Return the signature of an engine's manifest. Raises ConfigError if the key is invalid."""
    from model_signing import signing

    with _manifest_copy(engine) as folder, tempfile.TemporaryDirectory() as scratch:
        signature = Path(scratch) / "signature.json"
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
            config.sign(folder, signature)
        except (ValueError, TypeError, OSError) as error:  # the error's text may contain the key
            raise ConfigError(
                f"the private key is invalid ({type(error).__name__})",
                location=str(private_key),
                hint="Give an elliptic-curve key in PEM format, without a password",
            ) from None
        return signature.read_text(encoding="utf-8")


def verify(engine: Engine, signature: str, public_key: Path) -> None:
    """Raise GateError unless the owner of `public_key` signed this engine's manifest with `signature`."""
    from model_signing import verifying

    with _manifest_copy(engine) as folder, tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "signature.json"
        file.write_text(signature, encoding="utf-8")
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(folder, file)
        except Exception as error:  # the library raises many types for unreadable signatures
            raise GateError(
                f"the signature does not match this engine and the key {public_key.name} ({first_line(error)})",
                location=str(engine.directory),
                hint="Do not use it, and find out who changed it",
            ) from error


@contextlib.contextmanager
def _manifest_copy(engine: Engine) -> Iterator[Path]:
    """Yield a temporary folder that contains only the engine's manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "engine"
        folder.mkdir()
        shutil.copyfile(engine.directory / MANIFEST, folder / MANIFEST)
        yield folder

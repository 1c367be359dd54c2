"""Test signatures, and that verification detects every kind of damage."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import samples

from edgeopt.core.artifact import MANIFEST, Engine
from edgeopt.errors import ConfigError, EdgeoptError, GateError
from edgeopt.release import signature


def key_pair(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """Write a private and a public key as PEM files and return their paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def test_signature_matches_only_its_engine_and_key(tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    _, other_public = key_pair(tmp_path, "other")
    engine, other_engine = (samples.engine(tmp_path / f"e{n}", seed=n) for n in range(2))
    signed = signature.sign(engine, private)
    signature.verify(engine, signed, public)
    for verify_mismatch in (
        lambda: signature.verify(other_engine, signed, public),
        lambda: signature.verify(engine, signed, other_public),
        lambda: signature.verify(engine, "", public),
        lambda: signature.verify(engine, "{}", public),
        lambda: signature.verify(engine, signed[:-40], public),
    ):
        with pytest.raises(GateError, match="does not match this engine"):
            verify_mismatch()


def test_invalid_private_key_is_not_shown(tmp_path: Path) -> None:
    engine = samples.engine(tmp_path / "e")
    (tmp_path / "bad.pem").write_text("s3cret")
    for key in ("bad.pem", "none.pem"):
        with pytest.raises(ConfigError, match=key) as caught:
            signature.sign(engine, tmp_path / key)
        assert "s3cret" not in str(caught.value)


def test_thousand_damaged_engines_are_refused(tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    engine = samples.engine(tmp_path / "engine")
    signed, sha256 = signature.sign(engine, private), engine.manifest_sha256
    draw = random.Random(0)
    paths = [p.name for p in sorted(engine.directory.iterdir())]
    passed = []
    for n in range(1000):
        folder = tmp_path / "damaged"
        shutil.copytree(engine.directory, folder)
        damage = apply_random_damage(folder / (MANIFEST if n % 2 else draw.choice(paths)), draw)
        try:
            damaged = Engine.read(folder)
            damaged.verify()
        except EdgeoptError:
            pass  # detected without the signature
        else:
            if damaged.digest == engine.digest and damaged.manifest_sha256 == sha256:
                passed.append(damage)
            elif n % 20 == 1:  # a verification takes 0.1 s
                with pytest.raises(GateError):
                    signature.verify(damaged, signed, public)
        shutil.rmtree(folder)
    assert passed == []


def apply_random_damage(path: Path, draw: random.Random) -> str:
    """Damage a file in a random way and return a description of the damage."""
    content = bytearray(path.read_bytes())
    index = draw.randrange(len(content))
    match draw.choice(("bit", "byte", "cut", "hole", "insert", "swap", "delete")):
        case "bit":
            content[index] ^= 1 << draw.randrange(8)
        case "byte":
            content[index] = (content[index] + draw.randrange(1, 256)) % 256
        case "cut":
            del content[index:]
        case "hole":
            del content[index : index + draw.randrange(1, 50)]
        case "insert":
            content[index:index] = draw.randbytes(draw.randrange(1, 20))
        case "swap":
            other = next(i for i in range(len(content)) if content[i] != content[index])
            content[index], content[other] = content[other], content[index]
        case "delete":
            path.unlink()
            return f"{path.name} was deleted"
    path.write_bytes(content)
    return f"{path.name} at {index}"

"""Checkpoint and Engine: a directory plus a manifest that names every file, its bytes and sha256.

A directory without a manifest is not an artifact: it is written last, so a killed writer leaves
nothing that looks complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

from edgeopt.core.config_objects import digest
from edgeopt.core.model_spec import ModelSpec
from edgeopt.errors import BuildError, InputError

MANIFEST = "edgeopt.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A directory of files with its manifest.

    `made_by` is plain data about the maker (recipe, versions); it is no part of the digest, which
    depends on `format`, `spec` and the files' content alone.
    """

    directory: Path
    format: str
    spec: ModelSpec
    files: tuple[FileRecord, ...]
    made_by: Mapping[str, Any]

    @property
    def digest(self) -> str:
        content = [[f.path, f.sha256] for f in sorted(self.files, key=lambda f: f.path)]
        return digest([self.format, self.spec.to_json(), content])

    @property
    def size_bytes(self) -> int:
        """Bytes to deploy: every file of the artifact, without the manifest."""
        return sum(f.size_bytes for f in self.files)

    @property
    def manifest_sha256(self) -> str:
        """Of the manifest as it lies in the folder."""
        return sha256_of(self.directory / MANIFEST)

    def summary(self) -> dict[str, Any]:
        """Where it lies and what it is, in plain JSON types."""
        return {
            "directory": str(self.directory),
            "digest": self.digest,
            "manifest_sha256": self.manifest_sha256,
            "size_bytes": self.size_bytes,
        }

    @classmethod
    def seal(cls, directory: Path, *, format: str, spec: ModelSpec, made_by: Mapping[str, Any]) -> Self:
        """Hash the files in `directory`, write its manifest and return the artifact."""
        paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
        files = tuple(
            FileRecord(path=p.relative_to(directory).as_posix(), size_bytes=p.stat().st_size, sha256=sha256_of(p))
            for p in paths
        )
        artifact = cls(directory=directory, format=format, spec=spec, files=files, made_by=made_by)
        document = {
            "format": format,
            "digest": artifact.digest,
            "spec": spec.to_json(),
            "files": [{n: getattr(f, n) for n in f.__slots__} for f in files],
            "made_by": made_by,
        }
        (directory / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
        return artifact

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The artifact in `directory`; sizes are compared, `verify` also compares hashes."""
        path = directory / MANIFEST
        if not path.is_file():
            raise InputError("no manifest is here", location=str(directory), hint="Give a folder that edgeopt made")
        try:
            document = json.loads(path.read_text())
            artifact = cls(
                directory=directory,
                format=document["format"],
                spec=ModelSpec.from_json(document["spec"]),
                files=tuple(FileRecord(**f) for f in document["files"]),
                made_by=document["made_by"],
            )
            paths = [PurePosixPath(f.path) for f in artifact.files]
            unchanged = artifact.digest == document["digest"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the manifest cannot be read ({error})", location=str(path), hint="Build it again"
            ) from error
        for record, pure in zip(artifact.files, paths, strict=True):
            if pure.is_absolute() or ".." in pure.parts:
                raise InputError(
                    f"file name {record.path!r} leaves the folder", location=str(path), hint="Do not use it"
                )
            file = directory / record.path
            if not file.is_file():
                raise InputError(f"file {record.path!r} is missing", location=str(directory), hint="Build it again")
            if file.stat().st_size != record.size_bytes:
                raise _changed(file, f"{file.stat().st_size} bytes instead of {record.size_bytes}")
        if not unchanged:
            raise InputError("the manifest was changed after it was written", location=str(path), hint="Build it again")
        return artifact

    def verify(self) -> None:
        """Compare every file's sha256 with the manifest; InputError names the first that differs."""
        for record in self.files:
            if sha256_of(self.directory / record.path) != record.sha256:
                raise _changed(self.directory / record.path, "its sha256 differs from the manifest")


class Checkpoint(Artifact):
    """Weights as safetensors in Hugging Face layout, with tokenizer and per-layer sizes."""

    __slots__ = ()
    FORMAT: ClassVar[str] = "checkpoint-1"


class Engine(Artifact):
    """What a runtime executes; `format` is the runtime's name and version of the layout."""

    __slots__ = ()

    def require_format(self, format: str) -> None:
        """BuildError where it is an engine of another runtime, or of another version of its layout."""
        if self.format != format:
            raise BuildError(
                f"this is a {self.format} engine", location=str(self.directory), hint=f"Give one of format {format}"
            )


def link_file(source: Path, target: Path) -> None:
    """The same file under another name, as a hard link where the file system allows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = source.resolve()
    try:
        os.link(origin, target)
    except OSError:
        import shutil  # which the measured process does without

        shutil.copyfile(origin, target)


def link_tree(source: Path, target: Path) -> None:
    """The same files in another folder, as hard links where the file system allows."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            link_file(path, target / path.relative_to(source))


def sha256_of(path: Path) -> str:
    import hashlib  # its library takes 5 MiB, which the measured process does without

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed(path: Path, how: str) -> InputError:
    return InputError(f"the file was changed: {how}", location=str(path), hint="Build it again or restore the file")

"""Read, write and verify checkpoints and engines: folders with a manifest of every file, its size and its SHA-256.

The manifest is written last. A folder without one is not an artifact, so a killed writer leaves nothing that looks
complete.
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
    """Path relative to the folder, size and SHA-256 of one file."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactSummary:
    """Folder, digests and size of an artifact, as stored in a result.

    Attributes:
        size_bytes: bytes to deploy: all files without the manifest.
    """

    directory: str
    digest: str
    manifest_sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """Folder of files with a manifest.

    Attributes:
        directory: folder of the files.
        format: name and version of the layout.
        spec: sizes of the model.
        files: every file except the manifest.
        made_by: origin (recipe, library versions) as plain data. It is not part of the digest.
    """

    directory: Path
    format: str
    spec: ModelSpec
    files: tuple[FileRecord, ...]
    made_by: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Return the digest of format, spec, and the path and content of every file."""
        content = [[f.path, f.sha256] for f in sorted(self.files, key=lambda f: f.path)]
        return digest([self.format, self.spec.to_json(), content])

    @property
    def size_bytes(self) -> int:
        """Return the total size of all files except the manifest."""
        return sum(f.size_bytes for f in self.files)

    @property
    def manifest_sha256(self) -> str:
        """Return the SHA-256 of the manifest in the folder."""
        return sha256_of(self.directory / MANIFEST)

    def summary(self) -> ArtifactSummary:
        """Return folder, digests and size."""
        return ArtifactSummary(
            directory=str(self.directory),
            digest=self.digest,
            manifest_sha256=self.manifest_sha256,
            size_bytes=self.size_bytes,
        )

    @classmethod
    def seal(cls, directory: Path, *, format: str, spec: ModelSpec, made_by: Mapping[str, Any]) -> Self:
        """Hash the files in `directory`, write the manifest and return the artifact."""
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
        """Read the artifact in `directory` and check the size of every file. Use `verify` to check hashes.

        Raises:
            InputError: the manifest is missing or invalid, or a file is missing or has another size.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise InputError(
                f"the folder has no manifest {MANIFEST}",
                location=str(directory),
                hint="Use a checkpoint or an engine that edgeopt wrote",
            )
        try:
            document = json.loads(path.read_text())
            artifact = cls(
                directory=directory,
                format=document["format"],
                spec=ModelSpec.from_json(document["spec"]),
                files=tuple(FileRecord(**f) for f in document["files"]),
                made_by=document["made_by"],
            )
            relative_paths = [PurePosixPath(f.path) for f in artifact.files]
            digest_matches = artifact.digest == document["digest"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the manifest cannot be read ({error})", location=str(path), hint="Build the artifact again"
            ) from error
        for record, relative_path in zip(artifact.files, relative_paths, strict=True):
            if relative_path.is_absolute() or ".." in relative_path.parts:
                raise InputError(
                    f"`path` must stay inside the folder, got {record.path!r}",
                    location=str(path),
                    hint="Do not use this artifact: its manifest may be malicious",
                )
            file = directory / record.path
            if not file.is_file():
                raise InputError(
                    f"file {record.path!r} is missing", location=str(directory), hint="Build the artifact again"
                )
            if file.stat().st_size != record.size_bytes:
                raise _modified(file, f"its size is {file.stat().st_size} bytes, the manifest has {record.size_bytes}")
        if not digest_matches:
            raise InputError(
                "the manifest was modified after it was written", location=str(path), hint="Build the artifact again"
            )
        return artifact

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest. Raises InputError for the first difference."""
        for record in self.files:
            if sha256_of(self.directory / record.path) != record.sha256:
                raise _modified(self.directory / record.path, "its SHA-256 differs from the manifest")


class Checkpoint(Artifact):
    """Weights as safetensors in Hugging Face layout, with tokenizer and sizes of every layer."""

    __slots__ = ()
    FORMAT: ClassVar[str] = "checkpoint-1"


class Engine(Artifact):
    """Model in the form that a runtime executes. `format` is the runtime's name and the version of its layout."""

    __slots__ = ()

    @property
    def runtime_config(self) -> Mapping[str, Any]:
        """Return the config of the runtime that built the engine. Raises InputError if the manifest has none."""
        if "runtime" not in self.made_by:
            raise InputError(
                "the folder must contain an engine, got a checkpoint",
                location=str(self.directory),
                hint="Give the folder of an engine",
            )
        config: Mapping[str, Any] = self.made_by["runtime"]
        return config

    @property
    def library_versions(self) -> Mapping[str, str]:
        """Return the versions of the libraries that built the engine; empty if they are unknown."""
        versions: Mapping[str, str] = self.made_by.get("versions", {})
        return versions

    def require_format(self, format: str) -> None:
        """Raise BuildError if the engine has another format."""
        if self.format != format:
            raise BuildError(
                f"the engine must have the format {format}, got {self.format}",
                location=str(self.directory),
                hint="Open it with the runtime that built it, or build it again",
            )


def link_file(source: Path, target: Path) -> None:
    """Create a hard link to `source` at `target`, or a copy if the file system does not support links.

    Raises FileExistsError if `target` exists: a copy would overwrite every file that is linked to it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = source.resolve()
    try:
        os.link(origin, target)
    except FileExistsError:
        raise
    except OSError:
        import shutil  # not imported at the top, to keep the measured process small

        shutil.copyfile(origin, target)


def link_tree(source: Path, target: Path) -> None:
    """Link every file of the folder `source` into the folder `target` with `link_file`."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            link_file(path, target / path.relative_to(source))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    import hashlib  # importing hashlib at the top would cost the measured process 5 MiB

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _modified(path: Path, difference: str) -> InputError:
    return InputError(
        f"the file was modified: {difference}", location=str(path), hint="Restore the file or build the artifact again"
    )

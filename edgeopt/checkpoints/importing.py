"""Import a Hugging Face folder as a checkpoint. All checks run without executing code from the folder."""

from __future__ import annotations

import json
import struct
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from edgeopt.checkpoints import tokenizer
from edgeopt.core.artifact import MANIFEST, Checkpoint
from edgeopt.core.config_objects import to_config
from edgeopt.core.model_spec import ModelSpec
from edgeopt.core.protocols import ModelSource
from edgeopt.errors import InputError

COPIED_FILES = (*tokenizer.FILES, "generation_config.json")
"""Files that checkpoints and engines copy unchanged from their model."""
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def fingerprint(folder: Path) -> list[list[object]]:
    """Return the path of a folder, and the name, size and modification time of every file directly inside it."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return [[str(folder)], *([p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files)]


def step_identity(step: Any) -> list[object]:
    """Return plain data that determines the effect of a step: its config and the fingerprints of models it reads."""
    return [to_config(step), [fingerprint(source.locate()) for source in model_sources(step)]]


def model_sources(config_object: Any) -> list[ModelSource]:
    """Return all model sources in the fields of a config object, such as a teacher."""
    if isinstance(config_object, ModelSource):
        return [config_object]
    if not is_dataclass(config_object):
        return []
    return [source for field in fields(config_object) for source in model_sources(getattr(config_object, field.name))]


def import_checkpoint(folder: Path, directory: Path) -> Checkpoint:
    """Symlink the files of a Hugging Face folder, or of a checkpoint, into `directory` and seal it as a checkpoint.

    Raises:
        InputError: the weights are pickled, missing, corrupt or truncated, the tokenizer is missing, the architecture
            is not supported, or a file of a checkpoint was modified.
    """
    if (folder / MANIFEST).is_file():
        source = _read_checkpoint(folder)
        source.verify()
        for record in source.files:
            (directory / record.path).parent.mkdir(parents=True, exist_ok=True)
            (directory / record.path).symlink_to((folder / record.path).resolve())
        return Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=source.spec, made_by=source.made_by)
    spec = spec_of(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [p.name for pattern in PICKLE_PATTERNS for p in folder.glob(pattern)]
        if pickles:
            raise InputError(
                f"the weights must be safetensors, got the pickle {pickles[0]}, which can run code when it is loaded",
                location=str(folder),
                hint="Save the model with safe_serialization=True",
            )
        raise InputError(
            "the folder has no *.safetensors", location=str(folder), hint="Copy the weights next to config.json"
        )
    for path in weights:
        check_safetensors(path)
    tokenizer.load(folder)
    for path in [folder / "config.json", *weights, *(folder / name for name in COPIED_FILES)]:
        if path.is_file():
            (directory / path.name).symlink_to(path.resolve())
    return Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=spec, made_by={"source": str(folder)})


def _read_checkpoint(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint.read(folder)
    if checkpoint.format != Checkpoint.FORMAT:
        raise InputError(
            f"the folder must contain a model, got an engine of format {checkpoint.format}",
            location=str(folder),
            hint="Use a model in Hugging Face layout, or a checkpoint that edgeopt wrote",
        )
    return checkpoint


def spec_of(folder: Path) -> ModelSpec:
    """Return the spec from a checkpoint's manifest, or from the `config.json` of a Hugging Face folder.

    Raises:
        InputError: both files are missing, or the one that is read is invalid.
    """
    if (folder / MANIFEST).is_file():
        return _read_checkpoint(folder).spec
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(
            "the folder has no config.json", location=str(folder), hint="Use a model in Hugging Face layout"
        )
    try:
        return ModelSpec.from_hf_config(json.loads(config.read_text()), str(config))
    except ValueError as error:
        raise InputError(f"the file is not valid JSON ({error})", location=str(config), hint="Copy it again") from error


def copied_bytes(folder: Path) -> int:
    """Return the total size of the `COPIED_FILES` in a model folder."""
    return sum((folder / name).stat().st_size for name in COPIED_FILES if (folder / name).is_file())


def check_safetensors(path: Path) -> None:
    """Raise InputError if the header is invalid or the file does not have the size that follows from it.

    Format: https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + header_size > size:
            raise _corrupt(path, "the header is truncated")
        try:
            header = json.loads(file.read(header_size))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _corrupt(path, "the header is not a safetensors header") from error
    expected_size = 8 + header_size + max(ends, default=0)
    if expected_size != size:
        raise _corrupt(path, f"the size must be {expected_size} bytes according to the header, got {size}")


def _corrupt(path: Path, reason: str) -> InputError:
    return InputError(
        f"the weights are corrupt or truncated: {reason}", location=str(path), hint="Download or copy the file again"
    )

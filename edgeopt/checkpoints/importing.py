"""A Hugging Face folder taken in as a checkpoint, after checks that run none of its code."""

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

CARRIED = (*tokenizer.FILES, "generation_config.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def fingerprint(folder: Path) -> list[list[object]]:
    """Name, size and time of change of every file: equal as long as nobody wrote into the folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return [[str(folder)], *([p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files)]


def identity(step: Any) -> list[object]:
    """What determines a step's outcome beside its input: its description, and the models that it reads."""
    return [to_config(step), [fingerprint(source.locate()) for source in sources(step)]]


def sources(part: Any) -> list[ModelSource]:
    """Models that a part or one inside it reads, such as a teacher."""
    if isinstance(part, ModelSource):
        return [part]
    inner = [getattr(part, field.name) for field in fields(part)] if is_dataclass(part) else []
    return [source for value in inner for source in sources(value)]


def import_checkpoint(folder: Path, directory: Path) -> Checkpoint:
    """Link the checked files of a Hugging Face folder, or of a checkpoint, into `directory` and seal it.

    Raises InputError for a pickle checkpoint, a missing tokenizer, an unknown architecture, for corrupt or
    truncated safetensors and for a checkpoint that was changed; nothing is loaded that could run code.
    """
    if (folder / MANIFEST).is_file():
        made = _checkpoint(folder)
        made.verify()
        for record in made.files:
            (directory / record.path).parent.mkdir(parents=True, exist_ok=True)
            (directory / record.path).symlink_to((folder / record.path).resolve())
        return Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=made.spec, made_by=made.made_by)
    spec = spec_of(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [p.name for pattern in PICKLES for p in folder.glob(pattern)]
        if pickled:
            raise InputError(
                f"{pickled[0]} is a pickle, which can run code when it is read",
                location=str(folder),
                hint="Save the model with safe_serialization=True and give the safetensors",
            )
        raise InputError("there are no *.safetensors", location=str(folder), hint="Copy the weights beside config.json")
    for path in weights:
        check_safetensors(path)
    tokenizer.load(folder)
    files = [folder / "config.json", *weights, *(folder / n for n in CARRIED_FILES)]
    for path in files:
        if path.is_file():
            (directory / path.name).symlink_to(path.resolve())
    return Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=spec, made_by={"source": str(folder)})


def _checkpoint(folder: Path) -> Checkpoint:
    found = Checkpoint.read(folder)
    if found.format != Checkpoint.FORMAT:
        raise InputError(
            f"this is a {found.format} engine",
            location=str(folder),
            hint="Give a model in Hugging Face layout, or a checkpoint that edgeopt made",
        )
    return found


def spec_of(folder: Path) -> ModelSpec:
    """The spec in a checkpoint's manifest, or in a folder's `config.json`.

    Raises InputError where there is neither or it is not understood.
    """
    if (folder / MANIFEST).is_file():
        return _checkpoint(folder).spec
    config = folder / "config.json"
    if not config.is_file():
        raise InputError("there is no config.json", location=str(folder), hint="Give a folder in Hugging Face layout")
    try:
        return ModelSpec.from_hf_config(json.loads(config.read_text()), str(config))
    except ValueError as error:
        raise InputError(f"it is no JSON ({error})", location=str(config), hint="Copy the file again") from error


def carried_bytes(folder: Path) -> int:
    """Bytes of a model's files beside its weights that an engine takes over, such as the tokenizer."""
    return sum((folder / name).stat().st_size for name in CARRIED_FILES if (folder / name).is_file())


def check_safetensors(path: Path) -> None:
    """InputError where the header is broken or the file does not hold the bytes that it promises.

    Format: https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise _corrupt(path, "the header is cut off")
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _corrupt(path, "the header is no safetensors header") from error
    if 8 + length + max(ends, default=0) != size:
        raise _corrupt(path, f"{size} bytes are here, {8 + length + max(ends, default=0)} are promised")


def _corrupt(path: Path, how: str) -> InputError:
    return InputError(
        f"the weights are corrupt or truncated: {how}", location=str(path), hint="Download or copy the file again"
    )

"""Implement `edgeopt cache`."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError, InputError

if TYPE_CHECKING:
    from edgeopt.cache.eviction import Entry, Eviction

SUMMARY = "Show what the cache holds, or prune it"
EXAMPLE = "edgeopt cache prune --to '5 GiB'"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("show", "prune"), default="show", help="default: show")
    parser.add_argument("--state", type=Path, help="folder that holds the cache (default: that of the config)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--to", metavar="SIZE", help="prune the least recently used down to SIZE (default: cache.limit)")
    size.add_argument("--all", action="store_true", help="prune everything that no process uses")
    size.add_argument("--kind", help="prune every entry of one kind; after `measurement` the next run measures again")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cache.eviction import bytes_on_disk, evict, list_entries
    from edgeopt.config import assemble, parse
    from edgeopt.config.compose import compose
    from edgeopt.core import units

    given = [f"--{name}" for name in ("to", "all", "kind") if getattr(args, name) not in (None, False)]
    if args.action == "show" and given:
        option = given[0]
        raise ConfigError(
            f"`{option}` must be given with prune, got show", location=option, hint="Use `edgeopt cache prune`"
        )
    to_bytes = 0 if args.all or args.kind else None if args.to is None else units.size_bytes(args.to, "--to")
    config = compose(config_dir=args.config_dir)
    limit_bytes = parse.cache_limit(config)
    root = assemble.cache_folder(args.state or Path(config["state"]))
    if not root.is_dir():
        raise InputError(
            "there is no cache", location=str(root), hint="Run edgeopt run or sweep first, or give --state"
        )
    pruned = None
    if args.action == "prune":
        to_bytes = limit_bytes if to_bytes is None else to_bytes
        if to_bytes is None:
            raise ConfigError("cache.limit is null", location="--to", hint="Give --to SIZE or --all")
        kinds = sorted({entry.kind for entry in list_entries(root)})
        if args.kind and args.kind not in kinds:
            raise ConfigError(
                f"`--kind` must be a kind of entry in the cache, got {args.kind!r}",
                location="--kind",
                hint=f"The cache holds: {', '.join(kinds) or 'nothing'}",
            )
        pruned = evict(root, to_bytes, kind=args.kind or "")
    entries = list_entries(root)
    kinds = sorted({entry.kind for entry in entries})
    document = {
        "cache": str(root),
        "kinds": [_kind(kind, [e for e in entries if e.kind == kind]) for kind in kinds],
        "entries": len(entries),
        "bytes": bytes_on_disk(entries),
        "limit_bytes": limit_bytes,
        "pruned": None if pruned is None else _pruned(pruned),
    }
    return Outcome(document=document)


def _kind(kind: str, entries: list[Entry]) -> Document:
    from edgeopt.cache.eviction import bytes_on_disk

    oldest = datetime.fromtimestamp(min(entry.last_used_ns for entry in entries) / 1e9, UTC)
    return {
        "kind": kind,
        "entries": len(entries),
        "bytes": bytes_on_disk(entries),
        "oldest_use": oldest.isoformat(timespec="seconds"),
    }


def _pruned(done: Eviction) -> Document:
    from edgeopt.cache.eviction import bytes_on_disk

    return {
        "entries": len(done.evicted),
        "freed_bytes": done.freed_bytes,
        "in_use": len(done.in_use),
        "in_use_bytes": bytes_on_disk(done.in_use),
    }


def show(document: Document) -> None:
    from rich.table import Table

    from edgeopt.cli import display

    table = Table(title=f"cache {document['cache']}")
    table.add_column("kind")
    table.add_column("entries", justify="right")
    table.add_column("MiB", justify="right")
    table.add_column("oldest use")
    for kind in document["kinds"]:
        oldest = datetime.fromisoformat(kind["oldest_use"]).astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(kind["kind"], str(kind["entries"]), _mib(kind["bytes"]), oldest)
    table.add_section()
    table.add_row("total", str(document["entries"]), _mib(document["bytes"]), "")
    display.out.print(table)
    limit = document["limit_bytes"]
    display.out.print("limit: none" if limit is None else f"limit: {_mib(limit)} MiB")
    pruned = document["pruned"]
    if pruned is not None:
        display.out.print(f"pruned: {pruned['entries']} entries, {_mib(pruned['freed_bytes'])} MiB freed")
        if pruned["in_use"]:
            display.out.print(f"in use, kept: {pruned['in_use']} entries, {_mib(pruned['in_use_bytes'])} MiB")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f}"

"""Run the `edgeopt` command line: parse, execute one of edgeopt.cli.commands, print its document."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgeopt import __version__
from edgeopt.cli.commands.outcome import format_json
from edgeopt.errors import EdgeoptError

DESCRIPTION = "Find, measure and release the compressed version of a language model that fits a device."
EXIT_CODES = "exit codes: 0 done, 1 failed, 2 usage or config error, 3 nothing feasible, 4 refused by a gate"
INTERRUPTED = 130
GROUPS: Mapping[str, tuple[str, ...]] = {
    "search": ("run", "sweep", "worker", "predict", "profile"),
    "inspect": ("status", "front", "explain", "compare", "ui", "bench", "generate"),
    "release": ("promote", "approve", "rollback", "verify", "audit", "releases", "pull", "copy"),
    "operate": ("serve", "build-plan", "rebuild", "sync", "gc", "cache", "doctor", "completion"),
}
"""Commands by task, in the order of the work. Each is a module of edgeopt.cli.commands, with _ for -."""
COMMANDS = tuple(name for names in GROUPS.values() for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; results go to stdout, everything else to stderr."""
    args = _parsed(arguments)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # warnings of other libraries in child processes
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("\nedgeopt: interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EdgeoptError as error:
        if args.debug:
            traceback.print_exc()
        print(f"edgeopt: {_one_line(error)}{_file_of(error, args)}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # a bug of edgeopt or of a library: one line here, the traceback with --debug
        if args.debug:
            traceback.print_exc()
        summary = f"{type(error).__name__}: {_one_line(error)}"
        print(f"edgeopt: {summary}. Run again with --debug for the details", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    command = _command(args.command)
    if getattr(command, "BRIEF", False):
        gc.disable()  # garbage collection takes a sixth of the import time of MLflow and frees nothing
    try:
        outcome = command.execute(args)
    finally:
        gc.enable()
    if args.json:
        print(format_json(outcome.document))
    else:
        command.show(outcome.document)
    if outcome.error is not None:
        raise outcome.error
    return 0


def _command(name: str) -> Any:
    return importlib.import_module(f"edgeopt.cli.commands.{name.replace('-', '_')}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _file_of(error: EdgeoptError, args: argparse.Namespace) -> str:
    """Return ` (file:line)` of the key that an error names in the user's configs, unless an override set it."""
    overrides = [override.lstrip("+").partition("=") for override in getattr(args, "overrides", ())]
    overridden = error.location in {key for key, _, _ in overrides}
    if args.config_dir is None or not args.config_dir.is_dir() or not error.location or overridden:
        return ""
    from edgeopt.config.parse import find_key_location

    selected = {value for _, _, value in overrides} | {getattr(args, "config_name", "")}
    location = find_key_location(error.location, args.config_dir, selected)
    return f" ({location})" if location else ""


class _Parser(argparse.ArgumentParser):
    """A parser that prints a usage error as one line, and the commands of the top level in groups."""

    groups: str = ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"edgeopt: {message}. See {self.prog} --help\n")

    def format_help(self) -> str:
        return self.groups or super().format_help()


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; Hydra overrides may come before, between and after options."""
    top = parser()
    args, rest = top.parse_known_args(arguments)
    if rest and ("overrides" not in args or any(r.startswith("-") for r in rest)):
        top.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = _Parser(prog="edgeopt", description=DESCRIPTION, epilog=EXIT_CODES)
    top.add_argument("--version", action="version", version=f"edgeopt {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = _command(name)
        sub = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY}.",
            epilog=_epilog(command),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        sub.add_argument(
            "--config-dir", type=Path, metavar="DIR", help="folder of your own configs; they take precedence"
        )
        command.arguments(sub)
    top.groups = _grouped_help()
    return top


def _epilog(command: Any) -> str:
    """Return the example of a command and the config keys that matter to it."""
    keys = getattr(command, "KEYS", ())
    lines = [f"example: {command.EXAMPLE}"]
    if keys:
        lines.append(f"config keys: {', '.join(keys)}")
        lines.append("all keys: edgeopt run --cfg")
    return "\n".join(lines)


def _grouped_help() -> str:
    lines = ["usage: edgeopt [-h] [--version] COMMAND ...", "", DESCRIPTION]
    width = max(map(len, COMMANDS))
    for group, names in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<{width}}  {_command(name).SUMMARY}" for name in names)]
    lines += ["", "edgeopt COMMAND --help shows the options of a command with an example.", EXIT_CODES, ""]
    return "\n".join(lines)


def entry() -> None:
    """Run the command line and exit with its code."""
    sys.exit(main())


if __name__ == "__main__":
    entry()

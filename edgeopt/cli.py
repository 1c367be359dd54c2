"""The `edgeopt` command: parse, call one function of edgeopt.commands, print what it returns."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from edgeopt import __version__
from edgeopt.errors import EdgeoptError

EXIT_CODES = "exit codes: 0 done, 1 failed, 2 usage or config error, 3 nothing feasible, 4 refused by a gate"
INTERRUPTED = 130
RENDER = {"sweep": "sweep_result"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; results go to stdout, everything else to stderr."""
    args = _parsed(arguments)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of other libraries, in processes started from here
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
    except Exception as error:  # the last line of defence: one line for people, the rest on demand
        if args.debug:
            traceback.print_exc()
        told = f"{type(error).__name__}: {_one_line(error)}"
        print(f"edgeopt: {told}. Run again with --debug for the details", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    from edgeopt import commands, display

    outcome = getattr(commands, args.command)(args)
    if args.json:
        print(json.dumps(outcome.document, indent=1, allow_nan=False))
    else:
        getattr(display, RENDER.get(args.command, args.command))(outcome.document)
    if outcome.error is not None:
        raise outcome.error
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _file_of(error: EdgeoptError, args: argparse.Namespace) -> str:
    """Where in a user's folder of configs the key stands that an error names, unless an override set it."""
    overridden = any(o.lstrip("+").startswith(f"{error.place}=") for o in getattr(args, "overrides", ()))
    if args.config_dir is None or not args.config_dir.is_dir() or not error.place or overridden:
        return ""
    from edgeopt.config import written_at

    where = written_at(error.place, args.config_dir)
    return f" ({where})" if where else ""


class _Parser(argparse.ArgumentParser):
    """Tells a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"edgeopt: {message}. See {self.prog} --help\n")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before, between and after options, which argparse alone does not take."""
    top = parser()
    args, rest = top.parse_known_args(arguments)
    if rest and ("overrides" not in args or any(r.startswith("-") for r in rest)):
        top.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="edgeopt",
        description="Find, measure and release the compressed form of a language model that fits a device.",
        epilog=EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=f"edgeopt {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, example: str, *, composes: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text}.", epilog=f"example: {example}")
        command.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.add_argument(
            "--config-dir", type=Path, metavar="DIR", help="a folder of your own configs, which come first"
        )
        if composes:
            command.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
        return command

    run = add("run", "Evaluate one recipe and log it", "edgeopt run recipe=prune_lora_int4 step.prune.ratio=0.2")
    run.add_argument("--cfg", action="store_true", help="print the composed config and do nothing else")
    sweep = add(
        "sweep", "Search recipes under the target's limits, promote the best", "edgeopt sweep --config-name reference"
    )
    sweep.add_argument(
        "--config-name", "-n", default="reference", metavar="NAME", help="a file of sweeps/ (default: reference)"
    )
    sweep.add_argument("--cfg", action="store_true", help="print the composed config and do nothing else")
    front = add("front", "Show a study's trials and its Pareto front", "edgeopt front --json", composes=False)
    front.add_argument("study", nargs="?", help="the latest one by default")
    front.add_argument("--state", type=Path, default=Path(".edgeopt"), help="folder of studies (default: .edgeopt)")
    promote = add("promote", "Register the front's members by a policy", "edgeopt promote reference", composes=False)
    promote.add_argument("study", nargs="?", help="the latest one by default")
    promote.add_argument("--policy", default="default", metavar="NAME", help="a file of registry/ (default: default)")
    promote.add_argument("--state", type=Path, default=Path(".edgeopt"), help="folder of studies (default: .edgeopt)")
    add("estimate", "Predict size and memory of a recipe by arithmetic", "edgeopt estimate recipe=int4 target=sbc_4gib")
    profile = add(
        "profile",
        "Measure this machine and write it as a target",
        "edgeopt profile --out my/target/box.yaml",
        composes=False,
    )
    profile.add_argument("--name", default="", help="name of the target (default: the host's name)")
    profile.add_argument("--out", type=Path, help="file to write (default: stdout)")
    bench = add(
        "bench", "Measure an engine folder or a registered model", "edgeopt bench --engine models:/edgeopt@champion"
    )
    generate = add("generate", "Complete a prompt", "edgeopt generate --prompt 'def read('", composes=False)
    bench.add_argument("--engine", help="engine folder or models:/NAME@ALIAS")
    generate.add_argument(
        "engine",
        nargs="?",
        metavar="ENGINE",
        help="engine folder or models:/NAME@ALIAS (default: the bundled model in PyTorch)",
    )
    generate.add_argument("--prompt", default="def read_lines(path):", help="text to complete")
    generate.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens to generate (default: 64)"
    )
    add("doctor", "Say what this machine can build, run and measure", "edgeopt doctor", composes=False)
    return top


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()

"""Implement `edgeopt completion`."""

from __future__ import annotations

import argparse

from edgeopt.cli.commands.outcome import Document, Outcome

SUMMARY = "Print the completion script of a shell"
EXAMPLE = "source <(edgeopt completion bash)"
BRIEF = True
SHELLS = ("bash", "zsh", "fish")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="name of the shell")


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli.main import parser

    subparsers = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {
        name: sorted(option for action in sub._actions for option in action.option_strings if option.startswith("--"))
        for name, sub in subparsers.choices.items()
    }
    return Outcome(document={"shell": args.shell, "script": _SCRIPTS[args.shell](options)})


def show(document: Document) -> None:
    print(document["script"], end="")


def _bash(options: dict[str, list[str]]) -> str:
    cases = "\n".join(f"    {name}) words='{' '.join(flags)}' ;;" for name, flags in options.items())
    return f"""_edgeopt() {{
  local words='{" ".join(options)} --help --version'
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  [ "$COMP_CWORD" -eq 1 ] && words='{" ".join(options)} --help --version'
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
  [ ${{#COMPREPLY[@]}} -eq 0 ] && COMPREPLY=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o filenames -F _edgeopt edgeopt
"""


def _zsh(options: dict[str, list[str]]) -> str:
    return "autoload -U +X bashcompinit && bashcompinit\n" + _bash(options)


def _fish(options: dict[str, list[str]]) -> str:
    lines = [f"complete -c edgeopt -n __fish_use_subcommand -f -a {name}" for name in options]
    lines += [
        f"complete -c edgeopt -n '__fish_seen_subcommand_from {name}' -l {flag.removeprefix('--')}"
        for name, flags in options.items()
        for flag in flags
    ]
    return "\n".join(lines) + "\n"


_SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}

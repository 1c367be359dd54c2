"""Run the command line with `python -m edgeopt.cli`."""

from edgeopt.cli.main import entry

entry()

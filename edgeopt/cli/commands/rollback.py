"""`edgeopt rollback`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from edgeopt.cli.commands import registered
from edgeopt.cli.commands.outcome import Document, Outcome
from edgeopt.errors import ConfigError

SUMMARY = "Point an alias at the version before"
EXAMPLE = 'edgeopt rollback edgeopt@champion --reason "crashes on boards with 1 GiB"'


def arguments(parser: argparse.ArgumentParser) -> None:
    registered.version(parser, "NAME@ALIAS")
    registered.reason(parser, required=True)
    registered.policy(parser)


def execute(args: argparse.Namespace) -> Outcome:
    from edgeopt.cli import display
    from edgeopt.release import policy as policies
    from edgeopt.release.rollback import rollback
    from edgeopt.release.webhook import Webhooks, secret_of_environment

    reference = registered.reference(args)
    policy = policies.load(args.policy, args.config_dir)
    if policy.model != reference.name:
        raise ConfigError(
            f"the policy {policy.name} is that of {policy.model!r}, and not of {reference.name!r}",
            location="--policy",
            hint="Name that of this model",
        )
    with display.progress("rolling back") as progress:
        done = rollback(
            reference,
            args.reason,
            public_key=policy.public_key,
            webhooks=Webhooks(urls=policy.webhooks, secret=secret_of_environment()),
            tracking_uri=args.tracking_uri,
            progress=progress,
        )
    return Outcome(document=asdict(done))


def show(document: Document) -> None:
    from edgeopt.cli import display

    told = f"{document['model']}@{document['alias']} points at version {document['after']} again"
    display.out.print(f"{told}, and no longer at {document['before']}")

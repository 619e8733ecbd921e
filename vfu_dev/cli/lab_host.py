"""`vfu-dev lab host`: the far side of `lab migrate --destination ssh://HOST`; not meant to be typed."""

from __future__ import annotations

import asyncio
import sys

import click

from vfu_dev.cli import EXIT_FAILED
from vfu_dev.cli.shape import Command


@click.command(cls=Command, hidden=True, examples=["vfu-dev lab host"])
def host() -> None:
    """Serve one host of a move over standard input and output."""
    from vfu_dev.lab.far import serve_host

    if not asyncio.run(serve_host()):
        sys.exit(EXIT_FAILED)

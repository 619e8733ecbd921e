"""What shell completion offers for arguments that take the name of something shipped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from vfu_dev.errors import VfuDevError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def offer(names: Callable[[], Iterable[str]], *, files: bool = True) -> Complete:
    """Return a `shell_complete` that offers `names()`, and with `files` the shell's own completion of paths.

    Nothing is said of what goes wrong: a shell would show it in the middle of the line.
    """

    def complete(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found: list[str] = []
        with contextlib.suppress(VfuDevError, OSError):
            found = [name for name in names() if name.startswith(incomplete)]
        # First, because click's script for bash forgets what came before it.
        paths = [CompletionItem(incomplete, type="file")] if files else []
        return [*paths, *map(CompletionItem, found)]

    return complete


def shipped_profiles() -> list[str]:
    """Return the names of the shipped profiles."""
    from vfu_dev.profile.shipped import shipped

    return shipped()


def shipped_scenarios() -> list[str]:
    """Return the names of the shipped scenarios."""
    from vfu_dev.series.scenario import shipped

    return shipped()

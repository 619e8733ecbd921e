"""How every command of `vfu-dev` looks and answers: examples in its help, suggestions, `--json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from vfu_dev.errors import nearest

TO_STDOUT = "-"


class Option(click.Option):
    """An option with `aliases`: spellings that are taken, but not shown (an option's earlier names)."""

    def __init__(self, *args: Any, aliases: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.aliases = tuple(aliases)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Have the parser take the aliases too; help and messages go on naming `opts`."""
        shown = self.opts
        self.opts = [*shown, *self.aliases]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown


class JsonOption(Option):
    """`--json FILE`; `-`, or no FILE, is standard output.

    Args: any_word: whether every word that follows is the file's name. Else, in commands where `--json` was
          a flag and may stand before an argument, only `-` and a name that ends in `.json` is.
    """

    def __init__(self, *args: Any, any_word: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.any_word = any_word

    def takes(self, word: str) -> bool:
        """Return whether `word`, which follows `--json`, is its file."""
        if word == TO_STDOUT:
            return True
        return bool(word) and not word.startswith("-") and (self.any_word or word.endswith(".json"))


class _Examples(click.Command):
    """Ends its help with `examples`, each a command line as it can be typed."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, one a line."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples" if self.examples[1:] else "Example"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Command(_Examples):
    """A command of ours. Make it with `@click.command(cls=Command, examples=[...])`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with a file for each `--json`; a word that it could have been meant to take is explained."""
        left: list[str] = []
        try:
            return super().parse_args(ctx, list(_with_files(self, args, left)))
        except click.UsageError as error:
            word = next((one for one in left if one and one in error.message), None)
            if word is None:
                raise
            text = f"{error.message.rstrip('.')} (to write the JSON there: --json={word})"
            raise click.UsageError(text, error.ctx) from error


class Group(_Examples, click.Group):
    """A group of our commands: a mistyped name gets the nearest one."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that `args` begin with. Raises: click.UsageError: there is none."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else f"the commands are {', '.join(known)}"
            raise click.UsageError(f"No such command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


def _with_files(command: click.Command, args: Sequence[str], left: list[str]) -> Iterator[str]:
    """Yield `args` with each `--json` as `--json=FILE`; `left`: the words after it that are not its file."""
    options = {
        name: option
        for option in command.params
        if isinstance(option, click.Option)
        for name in (*option.opts, *getattr(option, "aliases", ()))
    }
    words = iter(range(len(args)))
    for at in words:
        word = args[at]
        option = options.get(word)
        if word == "--":
            yield from args[at:]
            return
        if isinstance(option, JsonOption):
            following = args[at + 1] if at + 1 < len(args) else ""
            if option.takes(following):
                next(words)
                yield f"{word}={following}"
            else:
                left.append(following)
                yield f"{word}={TO_STDOUT}"
            continue
        yield word
        if option is not None and not option.is_flag and not option.count:
            for _ in range(option.nargs):
                value = next(words, None)
                if value is not None:
                    yield args[value]

"""`vfu-dev lab run` and `scenarios`: series of moves, with statistics."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from vfu_dev.cli import EXIT_FAILED, EXIT_LESS
from vfu_dev.cli.completing import offer, shipped_scenarios
from vfu_dev.cli.output import announced, json_option, write_json
from vfu_dev.cli.qemu_options import asked_qemus, qemu_options
from vfu_dev.cli.shape import TO_STDOUT, Command
from vfu_dev.cli.signals import interrupted_status
from vfu_dev.errors import ConfigError, LabError
from vfu_dev.sizes import format_count
from vfu_dev.toml_source import parse_toml

if TYPE_CHECKING:
    from vfu_dev.series.progress import RunProgress
    from vfu_dev.series.scenario import Scenario

out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/series"),
    show_default=True,
    help="Each scenario's results go into a folder of its name below this one.",
)
force_option = click.option(
    "--force", is_flag=True, help="Delete the run that the folder holds, and start anew."
)


def _changes(texts: tuple[str, ...]) -> dict[str, Any]:
    """Return `--set KEY=VALUE` as a table; the value is TOML's, or text where it is none."""
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text}: expected KEY=VALUE, such as run.moves=10")
        try:
            changes[key.strip()] = parse_toml("--set", f"value = {value}")["value"]
        except ConfigError:
            changes[key.strip()] = value.strip()
    return changes


@click.command(
    cls=Command,
    examples=[
        "vfu-dev lab run steady --out out/series",
        "vfu-dev lab run my.toml --set run.moves=10 --set load.dirty-rate=4M --force",
        "vfu-dev lab run steady --shard 1/4 --out out/shard-1",
        "vfu-dev lab run steady --dask tcp://scheduler:8786 --resume",
    ],
)
@click.argument("names", metavar="[NAME|FILE.toml]...", nargs=-1, shell_complete=offer(shipped_scenarios))
@qemu_options
@click.option("--all", "everything", is_flag=True, help="Run every shipped scenario.")
@out_option
@click.option("--short", is_flag=True, help="Run the short form: a few moves, to see that it works.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run; finished points are kept.")
@force_option
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the scenario (run.moves=10, load.dirty-rate=4M); repeatable.",
)
@click.option(
    "--shard",
    "shard_text",
    metavar="I/N",
    help="Make part I of N (1/4 to 4/4), on this machine; `lab merge` joins them.",
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Make the points on the workers of this Dask cluster: tcp://HOST:PORT, or a scheduler file.",
)
@json_option("Also write the summaries as JSON", any_word=False)
@click.option("--quiet", is_flag=True, help="Show no progress, only the table.")
def run(
    names: tuple[str, ...],
    everything: bool,
    out: Path,
    short: bool,
    resume: bool,
    force: bool,
    settings: tuple[str, ...],
    shard_text: str | None,
    dask: str | None,
    json_path: str | None,
    quiet: bool,
    **sides: Any,
) -> None:
    """Run scenarios: move VMs back and forth under load, and report percentiles of downtime and time.

    NAME is a shipped scenario (`vfu-dev lab scenarios` lists them), FILE.toml one of your own
    (vfu-dev docs series). The folder gets scenario.toml, moves.csv (a row for each move), summary.json,
    report.html, table.md and plots. Logs are kept of the first 5 moves that went wrong, 1 MiB of each file.

    The points of a sweep can be made on many machines: --shard and --dask (vfu-dev docs many-machines).

    \b
    Exit status:
      0  every move did what the scenario expects, and all its checks hold
      1  a move did not, or a check fails
      3  the checks hold, but a load reached less than 95 % of its rate
         or a device did not keep to its profile; a warning names the move
    """
    # Imported here: `--help` must not pay for numpy, matplotlib and QMP.
    from vfu_dev.series.parts import Shard, groups_of
    from vfu_dev.series.progress import RunProgress
    from vfu_dev.series.scenario import read_scenario, shipped

    chosen = [*names, *(shipped() if everything else ())]
    if not chosen:
        raise ConfigError(f"which scenario? A file, --all, or one of {', '.join(shipped())}")
    if resume and force:
        raise ConfigError("--resume and --force: one keeps the run that is there, the other deletes it")
    if shard_text and dask:
        raise ConfigError("--shard and --dask: each of them divides the points")
    shard = Shard.parse(shard_text) if shard_text else None
    changes, asked = _changes(settings), asked_qemus(sides)
    # All files are judged before the first VM starts.
    scenarios = [read_scenario(name, changes) for name in chosen]
    summaries, failed, dealt = [], False, 0
    for scenario in scenarios:
        how: dict[str, Any] = {"resume": resume, "force": force, "command": ["vfu-dev", *sys.argv[1:]]}
        groups = groups_of(scenario.chosen(short))
        if shard is not None:
            how |= {"shard": shard, "groups": shard.take(groups, dealt)}
            dealt += len(groups)
            if not how["groups"]:
                click.echo(f"{scenario.name}: nothing for shard {shard}", err=True)
                continue
        folder = out / scenario.name
        with RunProgress(Console(stderr=True), scenario.name, quiet) as progress:
            try:
                summary = _run(scenario, folder, progress, short, asked, dask, how)
            except KeyboardInterrupt:
                words = [word for word in sys.argv[1:] if word != "--force"]
                again = shlex.join(["vfu-dev", *words, *(() if resume else ("--resume",))])
                click.echo(f"interrupted; go on with: {again}", err=True)
                sys.exit(interrupted_status())
            except (ConfigError, LabError) as error:
                if len(scenarios) == 1:
                    raise
                click.echo(f"PROBLEM: {scenario.name}: {error}", err=True)
                failed = True
                continue
        summaries.append(summary)
        show_result(summary, folder)
    end_with(summaries, failed, json_path)


def _run(
    scenario: Scenario,
    folder: Path,
    progress: RunProgress,
    short: bool,
    asked: dict[str, str | None],
    dask: str | None,
    how: dict[str, Any],
) -> dict[str, Any]:
    """Run one scenario here, or on a cluster; `how`: arguments that both have in common, and the shard's."""
    if dask is not None:
        from vfu_dev.series.cluster import run_on_dask
        from vfu_dev.series.work import Work

        work = Work(scenario.name, scenario.text, short, scenario.changes, asked)
        return run_on_dask(work, dask, folder, progress, **how)
    from vfu_dev.series.artifacts import Artifacts
    from vfu_dev.series.prediction import annotation
    from vfu_dev.series.run import run_scenario

    artifacts = Artifacts.find(scenario.chosen(short), asked)
    return run_scenario(
        scenario, folder, progress, short=short, artifacts=artifacts, annotate=annotation, **how
    )


def end_with(summaries: Sequence[dict[str, Any]], failed: bool, json_path: str | None) -> None:
    """Write the summaries as JSON, and end with the exit status that they make.

    Args: failed: one more scenario has no summary.
    """
    from vfu_dev.series.summary import load_kept_up, profile_kept

    write_json(summaries[0] if len(summaries) == 1 else summaries, json_path)
    if failed or not all(summary["ok"] for summary in summaries):
        sys.exit(EXIT_FAILED)
    if not all(load_kept_up(summary) and profile_kept(summary) for summary in summaries):
        sys.exit(EXIT_LESS)


def show_result(summary: Mapping[str, Any], folder: Path) -> None:
    """Show a finished run's table, and write its page and pictures; those of a shard come with the merge."""
    _show(summary)
    if summary["shard"]:
        click.echo(f"shard {summary['shard']}: {folder}  (join them: vfu-dev lab merge)", err=True)
        return
    from vfu_dev.report.series import write_series

    with announced("drawing the report"):
        page = write_series(folder)
    click.echo(f"report: {page}", err=True)


def _show(summary: Mapping[str, Any]) -> None:
    from vfu_dev.report.series import HEADINGS, comparison_lines, table_rows

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    table = Table(title=f"{summary['title']}: percentiles 25 / 50 / 95", title_justify="left", box=None)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "point" else "right")
    for row in table_rows(summary):
        table.add_row(*row)
    console.print(table)
    if summary["fewest_moves"] is not None and summary["fewest_moves"] < summary["method_moves"]:
        fewest, asked = summary["fewest_moves"], summary["method_moves"]
        moves = format_count(fewest, "completed move")
        console.print(f"note: the smallest sample has {moves}; use at least {asked} before comparing")
    for point, text in summary["stood"].items():
        console.print(f"{point}, given up: {text}", markup=False, highlight=False)
    for line in comparison_lines(summary):
        console.print(line, markup=False, highlight=False)
    for check in summary["checks"]:
        console.print(
            f"{'holds' if check['ok'] else 'FAILS'}: {check['text']}", markup=False, highlight=False
        )
    for text in summary["warnings"]:
        console.print(f"warning: {text}", markup=False, highlight=False)
    for text in summary["problems"]:
        console.print(f"PROBLEM: {text}", markup=False, highlight=False)


@click.command(cls=Command, examples=["vfu-dev lab scenarios"])
@json_option("Write names, points and moves as JSON", any_word=False)
def scenarios(json_path: str | None) -> None:
    """List the shipped scenarios, and how long each takes on an idle machine, in full and in short form."""
    from vfu_dev.series.duration import expected_seconds, text
    from vfu_dev.series.scenario import read_scenario, shipped

    found = [read_scenario(name) for name in shipped()]
    rows: list[dict[str, Any]] = [
        {
            "name": one.name,
            "title": one.title,
            "about": one.about,
            "points": [point.name for point in one.points],
            "moves": sum(point["run.moves"] for point in one.points),
            "short_moves": sum(point["run.moves"] for point in one.short_points),
            "expected_seconds": round(expected_seconds(one.points)),
            "short_expected_seconds": round(expected_seconds(one.short_points)),
        }
        for one in found
    ]
    write_json({"scenarios": rows}, json_path)
    if json_path == TO_STDOUT:
        return
    table = Table(box=None, header_style="bold")
    for heading in ("name", "points", "moves", "takes", "--short", "what"):
        table.add_column(heading, justify="left" if heading in ("name", "what") else "right")
    for one, row in zip(found, rows, strict=True):
        takes = [text(row[key]) for key in ("expected_seconds", "short_expected_seconds")]
        table.add_row(one.name, str(len(one.points)), str(row["moves"]), *takes, one.title)
    Console().print(table)

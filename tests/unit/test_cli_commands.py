"""Every command of `vfu-dev`: its help, its exit statuses, `--json`, the options' names and their aliases.

The commands come from click's tree: one that is added without an entry here fails the test.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from vfu_dev import JSON_VERSION
from vfu_dev.cli import cli, main
from vfu_dev.cli.extras import missing_text
from vfu_dev.cli.load_options import load_of, load_options
from vfu_dev.cli.params import for_each_side, of_side
from vfu_dev.cli.shape import Command, Group, JsonOption, Option
from vfu_dev.workload import Workload

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "tests/unit/data/lab-not-converging.json"
EXAMPLES = ROOT / "docs/examples"
TRACE = ROOT / "tests/data/traces/10.2-source.log.xz"
PROFILE = ROOT / "tests/unit/data/nic.toml"
RESULT = ROOT / "docs/results/idle"
NOWHERE = "/nowhere/x.sock"


def commands(
    command: click.Command = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield the words of each command that does something, and the command."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    ctx = click.Context(command)
    for name in command.list_commands(ctx):
        found = command.get_command(ctx, name)
        assert found is not None
        yield from commands(found, (*path, name))


LEAVES = dict(commands())


def groups(
    command: click.Command = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Group]]:
    """Yield the words of each group, and the group."""
    if isinstance(command, click.Group):
        yield path, command
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            yield from groups(command.get_command(ctx, name) or command, (*path, name))


def argv_of(words: tuple[str, ...], *arguments: str) -> list[str]:
    """Return a command line: `ctl` has its socket before the command."""
    first = [words[0], NOWHERE, *words[1:]] if words[:1] == ("ctl",) else list(words)
    return [*first, *arguments]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; returns status, standard output and standard error."""

    def run_in_process(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(left.value.code or 0), out, err

    return run_in_process


# --- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_help_ends_with_an_example_that_parses(words: tuple[str, ...], run: Run) -> None:
    """And every option that is shown has a sentence."""
    command = LEAVES[words]
    assert isinstance(command, Command)
    status, out, _ = run(*argv_of(words, "--help"))
    assert status == 0
    assert out.rstrip().splitlines()[-1].lstrip().startswith("vfu-dev "), out
    assert command.examples
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert re.match(r"[a-zA-Z].{12,}", option.help or ""), option.opts


@pytest.mark.parametrize(("words", "group"), list(groups()), ids=str)
def test_a_mistyped_command_gets_the_nearest_one(
    words: tuple[str, ...], group: click.Group, run: Run
) -> None:
    """In each group."""
    assert isinstance(group, Group)
    name = group.list_commands(click.Context(group))[0]
    status, _, err = run(*argv_of(words, f"{name}x"))
    assert status == 2
    assert f"did you mean {name!r}?" in err


def test_a_command_that_is_like_none_gets_the_list(run: Run) -> None:
    status, _, err = run("qqqqqq")
    assert status == 2
    assert "the commands are serve, info, check, hostile, attach" in err


# --- exit statuses ------------------------------------------------------------------------------------------

# What fails: words -> command line behind them. None: nothing but writing its JSON can fail.
FAILURES: dict[tuple[str, ...], list[str] | None] = {
    ("serve",): ["--socket", "TMP/s", "--memory", "64K", "--library", "/nowhere.so"],
    ("info",): [NOWHERE],
    ("check",): [NOWHERE],
    ("hostile",): ["--list", "--json=/dev/full"],
    ("attach",): [NOWHERE, "--", "qemu-system-x86_64"],
    ("migrate",): [NOWHERE, "/nowhere/b.sock"],
    ("load",): ["--socket", NOWHERE, "--dirty-rate", "1M"],
    ("check-device",): [f"{EXAMPLES / 'kvstore.py'}:KeyValueStore", "--json=/dev/full"],
    ("new-device",): ["/proc/nowhere/device.py"],
    ("top",): ["--once", NOWHERE],
    ("lab", "migrate"): ["--out", "TMP/out"],
    ("lab", "run"): ["idle", "--short", "--out", "TMP/out"],
    ("lab", "merge"): ["TMP/part", "--out", "TMP/out"],
    ("lab", "scenarios"): None,
    ("lab", "compare"): [str(RESULT), "TMP/slower", "--max-regression", "10"],
    ("lab", "model"): None,
    ("lab", "watch"): [
        f"--{socket}-{side}={NOWHERE}" for socket in ("qmp", "control") for side in ("source", "destination")
    ],
    ("lab", "host"): [],
    ("profile", "import"): [str(TRACE), "-o", "/dev/full", "--device", "1"],
    ("profile", "show"): [str(PROFILE), "--json=/dev/full"],
    ("profile", "diff"): [str(PROFILE), "TMP/other.toml"],
    ("profile", "fit"): [str(PROFILE), "-o", "/dev/full"],
    ("profile", "record"): ["-o", "TMP/calls", "--", "qemu-system-x86_64"],
    ("report",): [str(FIGURES), "--out", "/proc/nowhere/page.html"],
    ("bench",): ["mmio", "--quick"],
    ("build",): ["libvfio-user", "--sources", "TMP"],
    ("doctor",): [],
    ("docs",): None,
}
# Arguments that the commands of `ctl` need to be asked at all.
CTL_ARGUMENTS = {
    "load": ["--off"],
    "fault": ["op=irq,error"],
    "log-level": ["debug"],
    "dma-log": ["on"],
    "send": ['{"command": "status"}'],
}


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_what_fails_is_status_1(
    words: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line at the end of standard error, or the reason among its results."""
    shutil.copytree(RESULT, tmp_path / "slower")
    moves = tmp_path / "slower" / "moves.csv"
    head, *rows = moves.read_text().splitlines()
    column = head.split(",").index("downtime_ms")
    slower = [row.split(",") for row in rows]
    for cells in slower:
        cells[column] = str(float(cells[column] or 0) * 10 + 50)
    moves.write_text("\n".join([head, *(",".join(cells) for cells in slower)]) + "\n")
    (tmp_path / "other.toml").write_text(PROFILE.read_text().replace("4000000.0", "5000000.0"))
    # A shard that has no point yet.
    (tmp_path / "part").mkdir()
    form = {"scenario": "x", "short": False, "changes": {}, "versions": {}, "qemus": {}, "started": 1.0}
    (tmp_path / "part" / "form.json").write_text(json.dumps(form))
    (tmp_path / "part" / "scenario.toml").write_text("")
    # Nothing is built here, and nothing can be.
    monkeypatch.setenv("VFU_DEV_CACHE", str(tmp_path / "cache"))
    for name in ("QEMU", "LIBVFIO_USER", "GUEST", "VFIO_PRELOAD"):
        monkeypatch.setenv(f"VFU_DEV_{name}", "/nowhere/artifact")
    if words[0] == "ctl":
        arguments: list[str] | None = CTL_ARGUMENTS.get(words[1], [])
    else:
        assert words in FAILURES, f"{' '.join(words)}: what makes it fail? Add it to FAILURES"
        arguments = FAILURES[words]
    if arguments is None:
        arguments = ["--json=/dev/full"]
    status, _, err = run(*argv_of(words, *(text.replace("TMP", str(tmp_path)) for text in arguments)))
    assert status == 1, err
    assert words == ("doctor",) or err.strip()


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_an_option_that_does_not_exist_is_status_2(words: tuple[str, ...], run: Run) -> None:
    status, out, err = run(*argv_of(words, "--no-such-option"))
    assert (status, out) == (2, "")
    assert "--no-such-option" in err


USAGE_ERRORS = [
    "serve",
    "serve --socket /nowhere/s --memory lots",
    "serve --socket /nowhere/s --page-size 1K",
    "serve --socket /nowhere/s --fault op=nothing",
    "serve --socket /nowhere/s --dirty-rate fast",
    "serve --config /nowhere.toml",
    "info",
    "info /nowhere/s --timeout 0",
    "attach -- true",
    "attach /nowhere/a",
    "attach /nowhere/a --",
    "attach /nowhere/a -- true %sysfsdev1%",
    "attach /nowhere/a --iommu iommufd-fd -- true %sysfsdev0%",
    "migrate /nowhere/a",
    "migrate /nowhere/a /nowhere/b --max-bandwidth fast",
    "migrate /nowhere/a /nowhere/b --json /proc/nowhere/x.json",
    "load",
    "load --rate 4M",
    "load --control a --pattern zipf",
    "load --control a --dirty-rate 1M --write-rate 1M",
    "load --control a --dirty-rate 1M --check",
    "load --control a --dirty-rate 1M --device device.py:Device",
    "check-device",
    "check-device nowhere.py:Device",
    "new-device",
    "new-device ring-nic.py",
    "lab migrate --device nowhere.py:Device",
    "lab migrate --verify crc",
    "lab migrate --verify dma --load-place device",
    "top",
    "top a --interval 0",
    "ctl",
    "ctl a",
    "ctl a load",
    "ctl a fault",
    "lab run",
    "lab run no-such-scenario",
    "lab run idle --set nothing",
    f"lab run idle --set run.moves={'[' * 5000}",
    f"lab run idle --set run.moves={'9' * 5000}",
    "lab run idle --resume --force",
    "lab run idle --shard 3/2",
    "lab run idle --shard 1/2 --dask tcp://127.0.0.1:1",
    "lab run idle --dask nonsense://x",
    "lab merge",
    "lab merge docs",
    "lab migrate --memory 1000",
    "lab migrate --downtime-limit 0",
    "lab migrate --guest none --accel kvm",
    "lab migrate --guest none --access mmap",
    "lab migrate --fault op=nothing",
    "lab compare a b",
    "lab model --memory 5000",
    "lab model --map x.png",
    "lab model --max-bandwidth 0",
    "profile import",
    "profile import nosuch.log -o /dev/null",
    "profile import README.md -o /dev/null",
    "profile import README.md -o /dev/null --with speed=1",
    "profile show README.md",
    "profile diff nosuch.toml README.md",
    "profile record -o /dev/null --",
    "report nosuch.json",
    "report README.md",
    "bench foo",
    "build foo",
    "doctor foo",
    "docs fault",
    "docs faults --json",
]


@pytest.mark.parametrize("line", USAGE_ERRORS)
def test_usage_errors_are_status_2(line: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether click finds them or we do; nothing was done, nothing goes to standard output."""
    monkeypatch.chdir(ROOT)
    for name in ("QEMU", "LIBVFIO_USER", "GUEST", "VFIO_PRELOAD"):
        monkeypatch.setenv(f"VFU_DEV_{name}", "/dev/null")
    status, out, err = run(*line.split())
    assert (status, out) == (2, ""), err
    assert err.strip()


def test_a_qemu_in_the_home_directory_of_nobody_is_one_that_is_not_there(run: Run) -> None:
    status, out, err = run("lab", "migrate", "--qemu", "~nobody-has-this-name/qemu")
    assert (status, out) == (1, "")
    assert err.startswith("vfu-dev: ~nobody-has-this-name/qemu: no such QEMU"), err


def test_the_statuses_of_the_page_are_those_of_the_code() -> None:
    """docs/commands.md has the one table."""
    text = (ROOT / "docs/commands.md").read_text()
    table = text.partition("## Exit status")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\S+) \|", table, re.MULTILINE)[1:] == ["0", "1", "2", "3", "128+N"]


# --- --json -------------------------------------------------------------------------------------------------


@click.command(cls=Command, examples=["vfu-dev x"])
@click.argument("words", nargs=-1)
@click.option("--json", "json_path", cls=JsonOption)
@click.option("--name")
def asks(**given: Any) -> None:
    """Have arguments that could be taken for a file."""


@click.command(cls=Command, examples=["vfu-dev x"])
@click.option("--json", "json_path", cls=JsonOption, any_word=True)
@click.option("--quiet", is_flag=True)
def writes(**given: Any) -> None:
    """Have none."""


@pytest.mark.parametrize(
    ("command", "line", "path", "words"),
    [
        (asks, "--json a.sock", "-", ("a.sock",)),
        (asks, "a.sock --json", "-", ("a.sock",)),
        (asks, "--json - a.sock", "-", ("a.sock",)),
        (asks, "--json out.json a.sock", "out.json", ("a.sock",)),
        (asks, "--json=out a.sock", "out", ("a.sock",)),
        (asks, "--json /dev/stdout", "-", ("/dev/stdout",)),
        (asks, "--json --name n a.sock", "-", ("a.sock",)),
        (asks, "--name --json a.sock", None, ("a.sock",)),
        (asks, "-- --json a.sock", None, ("--json", "a.sock")),
        (writes, "--json out", "out", None),
        (writes, "--json /dev/stdout", "/dev/stdout", None),
        (writes, "--json --quiet", "-", None),
        (writes, "--json", "-", None),
        (writes, "", None, None),
    ],
)
def test_what_follows_json(
    command: click.Command, line: str, path: str | None, words: tuple[str, ...] | None
) -> None:
    """`-` and NAME.json everywhere; any other word only where it could be nothing else; never an option."""
    ctx = command.make_context("x", line.split())
    assert ctx.params["json_path"] == path
    assert ctx.params.get("words") == words


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_json_is_the_same_option_everywhere(words: tuple[str, ...]) -> None:
    """All that show figures have it; where a word behind it may be an argument, it takes none by chance."""
    command = LEAVES[words]
    options = [option for option in command.params if "--json" in option.opts]
    if words in (("serve",), ("attach",), ("report",), ("lab", "host"), ("profile", "record")):
        assert not options
        return
    (option,) = options
    assert isinstance(option, JsonOption)
    takes_arguments = any(isinstance(param, click.Argument) for param in command.params)
    assert option.any_word <= (not takes_arguments or words == ("migrate",))


def test_a_word_behind_json_that_is_left_over_is_explained(run: Run) -> None:
    status, _, err = run("info", "a.sock", "--json", "out")
    assert status == 2
    assert "--json=out" in err


def test_json_goes_to_a_file_and_the_text_to_standard_output(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new" / "scenarios.json"
    status, out, _ = run("lab", "scenarios", "--json", path)
    assert (status, "switchover-ack" in out) == (0, True)
    written = json.loads(path.read_text())
    assert written["version"] == JSON_VERSION
    assert {one["name"] for one in written["scenarios"]} >= {"idle", "steady"}
    for bare in (["--json"], ["--json", "-"], ["--json=-"]):
        status, out, _ = run("lab", "scenarios", *bare)
        assert json.loads(out) == written


# --- names --------------------------------------------------------------------------------------------------

# Names that an option must not have any more, and what it is called.
EARLIER = {
    "--rate": "--dirty-rate, --write-rate",
    "--write": "--write-size",
    "--bandwidth": "--max-bandwidth",
    "--switchover-bandwidth": "--avail-switchover-bandwidth",
    "--src-control": "--control-source",
    "--dst-control": "--control-destination",
    "--seconds": "--duration",
}


def test_earlier_names_are_not_shown(run: Run) -> None:
    for words in LEAVES:
        _, out, _ = run(*argv_of(words, "--help"))
        shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", out))
        assert not shown & set(EARLIER), words


@pytest.mark.parametrize(
    ("words", "earlier", "now"),
    [
        (("lab", "migrate"), "--switchover-bandwidth 1M", "--avail-switchover-bandwidth 1M"),
        (("lab", "model"), "--bandwidth 64M", "--max-bandwidth 64M"),
        (("lab", "model"), "--switchover-bandwidth 64M", "--avail-switchover-bandwidth 64M"),
        (
            ("migrate",),
            "a b --src-control x --dst-control y",
            "a b --control-source x --control-destination y",
        ),
        (("load",), "--memory vram --write 4K", "--memory-name vram --write-size 4K"),
        (("ctl", "load"), "--memory vram --seconds 3", "--memory-name vram --duration 3"),
        (("ctl", "reinit"), "--memory vram", "--memory-name vram"),
    ],
)
def test_earlier_names_are_taken(words: tuple[str, ...], earlier: str, now: str) -> None:
    command = LEAVES[words]
    old, new = (command.make_context("x", line.split()).params for line in (earlier, now))
    assert old == new


@click.command(cls=Command)
@load_options()
def loads(load_arguments: dict[str, Any]) -> Workload | None:
    """Return the load."""
    return load_of(load_arguments)


@pytest.mark.parametrize(
    ("line", "load"),
    [
        ("", None),
        ("--dirty-rate 8M", Workload(dirty_rate_bytes=8 << 20)),
        ("--dirty-rate 2000p", Workload(rate_pages=2000)),
        ("--write-rate 8M --write-size 4K", Workload(rate_bytes=8 << 20, write_bytes=4096)),
        ("--rate 8M --write 4K", Workload(rate_bytes=8 << 20, write_bytes=4096)),
        ("--rate 2000p", Workload(rate_pages=2000)),
    ],
)
def test_the_options_of_a_load(line: str, load: Workload | None) -> None:
    """A dirty rate counts pages, a write rate bytes written; --rate was either."""
    assert loads.main(line.split(), standalone_mode=False) == load


def test_qemus_names_have_qemus_defaults() -> None:
    """128 MiB/s, measured, 300 ms, in every command that has them; a downtime limit may be a fraction."""
    for words, command in LEAVES.items():
        options = {name: one for one in command.params if isinstance(one, Option) for name in one.opts}
        if (option := options.get("--max-bandwidth")) is not None:
            assert option.default == "128M", words
        if (option := options.get("--avail-switchover-bandwidth")) is not None:
            assert option.default == "0", words
        if (option := options.get("--downtime-limit")) is not None:
            assert option.default == 300.0
            assert option.type.convert("0.3", None, None) == 0.3


def test_an_option_for_each_side_is_one_line() -> None:
    @click.command()
    @for_each_side("front-end", help="What QEMU attaches.")
    @for_each_side("fault", multiple=True, help="A fault.")
    def migrates(**sides: Any) -> list[Any]:
        return [
            of_side(sides, name, side)
            for name in ("front-end", "fault")
            for side in ("source", "destination")
        ]

    line = "--front-end a --front-end-destination b --fault x --fault-source y"
    assert migrates.main(line.split(), standalone_mode=False) == ["a", "b", ("x", "y"), ("x",)]


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    """Each with the extra that brings it, and by the name that pip knows."""
    assert re.search(r"package qemu\.qmp is missing; run: pip install .*'jinja2", missing_text("qemu.qmp"))
    assert re.search(
        r"package distributed is missing; run: pip install 'distributed\S*' \(", missing_text("distributed")
    )

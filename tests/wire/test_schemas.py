"""What commands write as JSON keeps to the schemas in vfu_dev/schemas: real servers, real outputs.

Those of the lab are checked where moves are made: tests/lab/test_lab_command.py and test_series_run.py.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from schemakit import SCHEMAS, conforms, errors
from serverkit import ANY_DOWNTIME_ARGUMENTS, VFU_DEV, ServerFactory, run_vfu_dev

from vfu_dev.cli import cli
from vfu_dev.cli.shape import JsonOption

ROOT = Path(__file__).parents[2]


def written(*words: object, status: int = 0) -> Any:
    """Run a command; return its JSON."""
    done = subprocess.run([*VFU_DEV, *map(str, words), "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def names(command: click.Command = cli, path: tuple[str, ...] = ()) -> list[str]:
    """Return the schema that each command with --json has."""
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        below = {name: command.get_command(ctx, name) for name in command.list_commands(ctx)}
        return [
            found
            for name, one in below.items()
            if one and not one.hidden
            for found in names(one, (*path, name))
        ]
    return ["-".join(path)] if any(isinstance(option, JsonOption) for option in command.params) else []


# Commands of `ctl` that answer nothing, or whatever was asked; `lab watch` writes what `lab migrate` does,
# and `lab merge` what `lab run` does.
NOTHING = {"lab-watch", "lab-merge", "ctl-reinit", "ctl-dma-log", "ctl-quit", "ctl-send"}
# More than one form, and what is no command.
MORE = {"build-prune", "lab-model-against", "log-line"}


def test_every_command_that_writes_json_has_a_schema() -> None:
    """And a row in docs/versions.md, and a test that checks real output against it."""
    found = {path.stem for path in SCHEMAS.glob("*.json")}
    assert found == set(names()) - NOTHING | MORE
    page = (ROOT / "docs/versions.md").read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in found:
        schema = json.loads((SCHEMAS / f"{name}.json").read_text())
        command = schema["title"].partition(",")[0].removeprefix("vfu-dev ")
        assert f"| `{name}.json` | `{command}`" in page
        assert f'"{name}"' in tests or f'"{name.removeprefix("ctl-")}"' in tests, name


def test_a_value_of_another_type_and_a_missing_key_are_found() -> None:
    """So that no schema is one that everything keeps to."""
    for path in SCHEMAS.glob("*.json"):
        schema = json.loads(path.read_text())
        assert errors(schema, "text"), path.name
        item = schema.get("items") or schema.get("$defs", {}).get("summary") or schema
        assert item.get("required"), path.name
        assert errors(item, {}), path.name


def test_servers_and_what_talks_to_them(serve: ServerFactory) -> None:
    """Before a migration, after it on both sides, and with nobody there."""
    source, destination = serve("--fill", "7", "--trace-registers"), serve()
    conforms("info", written("info", source.socket))
    for server in (source, destination):
        conforms("ctl-status", written("ctl", server.socket, "status"))
    conforms("ctl-load", written("ctl", source.socket, "load", "--dirty-rate", "200p"))
    moved = written("migrate", source.socket, destination.socket)
    conforms("migrate", moved)
    assert moved["devices"][0]["digest_match"]
    conforms("migrate", written("migrate", "/nowhere/a.sock", destination.socket, status=1))
    for server in (source, destination):
        for name in ("status", "load-status", "digest", "checksums", "faults", "figures"):
            conforms(f"ctl-{name}", written("ctl", server.socket, name))
    conforms("ctl-registers", written("ctl", source.socket, "registers"))
    conforms("ctl-fault", written("ctl", destination.socket, "fault", "op=mig-read,delay=0.1"))
    conforms("ctl-faults", written("ctl", destination.socket, "faults"))
    conforms("ctl-log-level", written("ctl", destination.socket, "log-level", "info"))
    conforms("top", written("top", "--once", source.socket, destination.socket))
    conforms("top", written("top", "--once", source.socket, "/nowhere/a.sock", status=1))
    for place in (("--control", destination.socket), ("--socket", source.socket)):
        done = run_vfu_dev("load", "--dirty-rate", "20p", "--duration", "0.3", *place, "--json")
        assert done.returncode in (0, 3), done.stderr  # whether or not the machine carried it
        conforms("load", json.loads(done.stdout))


def test_lines_of_the_log(serve: ServerFactory) -> None:
    """Of both sides of a migration."""
    servers = [serve("--log-format", "json"), serve("--log-format", "json")]
    written("migrate", *(server.socket for server in servers), *ANY_DOWNTIME_ARGUMENTS)
    states = []
    for server in servers:
        server.stop()
        for line in server.log().splitlines():
            if line.startswith("{"):
                conforms("log-line", entry := json.loads(line))
                states.append(entry.get("to"))
    assert {"PRE_COPY", "STOP_COPY", "RESUMING"} <= set(states)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("build", "build libvfio-user"),
        ("check-device", "check-device docs/examples/kvstore.py:KeyValueStore"),
        ("docs", "docs"),
        ("lab-compare", "lab compare docs/results/precopy docs/results/precopy"),
        ("lab-model", "lab model --memory 64M --dirty-rate 8000p --max-bandwidth 32M"),
        ("lab-model", "lab model --memory 64M --dirty-rate 80000p --max-bandwidth 32M"),
        ("lab-scenarios", "lab scenarios"),
    ],
)
def test_commands_without_a_server(name: str, line: str, library: Path) -> None:
    conforms(name, written(*line.split()))


def test_a_new_device(tmp_path: Path) -> None:
    conforms("new-device", written("new-device", tmp_path / "device.py"))


def test_doctor_where_something_is_missing_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = subprocess.run([*VFU_DEV, "doctor", "--json"], capture_output=True, text=True)
    conforms("doctor", json.loads(done.stdout))
    monkeypatch.setenv("VFU_DEV_CACHE", str(tmp_path))
    conforms("doctor", written("doctor", status=1))

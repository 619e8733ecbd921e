"""`--config` and `--print-config`: what a file may say, who overrides whom, and what an error names."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from vfu_dev.cli.params import exact_size
from vfu_dev.cli.serve import command
from vfu_dev.errors import ConfigError
from vfu_dev.sizes import parse_size

KVSTORE = Path(__file__).parents[2] / "docs" / "examples" / "kvstore.py"


def serve(*arguments: str) -> Result:
    """Run `vfu-dev serve` as far as it goes without a library."""
    return CliRunner().invoke(command, list(arguments))


def printed(*arguments: str) -> dict[str, Any]:
    """Return what --print-config prints, read as TOML."""
    result = serve("--print-config", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return tomllib.loads(result.stdout)


def error_of(*arguments: str) -> str:
    """Return the one line that the command ends with."""
    result = serve("--print-config", *arguments)
    assert isinstance(result.exception, ConfigError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "dev.toml"


def test_the_defaults_are_printed_with_what_the_device_decides() -> None:
    config = printed()
    assert config["page-size"] == "4K"
    assert (config["vendor-id"], config["device-id"], config["class-code"]) == (0x4656, 0x4455, 0x088000)
    assert (config["subsystem-vendor-id"], config["subsystem-id"]) == (0x4656, 0x4455)
    assert (config["msix-vectors"], config["bar0-size"], config["bar2-size"]) == (4, "4K", "256M")
    assert config["msi-vectors"] == 4
    assert "initial" not in config


def test_what_is_printed_is_a_file_that_prints_the_same(file: Path) -> None:
    options = ["--memory", "3M", "--vendor-id", "0x1af4", "--bar4-size", "64K", "--msix-vectors", "300"]
    options += ["--msi-vectors", "7"]
    options += [
        "--name",
        'with "quotes" and \\ and ü',
        "--initial",
        "1M",
        "--socket",
        "/run/x",
        "--fill",
        "0x7",
    ]
    file.write_text(serve("--print-config", *options).stdout)
    again = serve("--print-config", "--config", str(file))
    assert again.stdout == file.read_text()
    config = tomllib.loads(again.stdout)
    assert config["name"] == 'with "quotes" and \\ and ü'
    assert (config["vendor-id"], config["msix-vectors"], config["bar4-size"]) == (0x1AF4, 300, "64K")
    assert config["msi-vectors"] == 7


def test_every_option_is_in_what_is_printed() -> None:
    text = serve("--print-config").stdout
    for option in command.params:
        assert isinstance(option, click.Option)
        key = max(option.opts, key=len)[2:]
        if key not in ("config", "print-config") and not option.hidden:
            assert f"\n{key} = " in text or f"# {key} is not set" in text, key


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(file: Path) -> None:
    file.write_text('memory = "2M"\nname = "filed"\npre-copy = false\nmetrics-port = 9470\nrevision = 7\n')
    config = printed("--config", str(file), "--name", "typed", "--revision", "0x9")
    assert (config["name"], config["revision"]) == ("typed", 9)
    assert (config["pre-copy"], config["metrics-port"], config["bar2-size"]) == ("off", 9470, "2M")
    assert config["page-size"] == "4K"


def test_what_a_device_of_ones_own_does_not_take_is_left_out(file: Path) -> None:
    first = serve("--print-config", "--device", f"{KVSTORE}:KeyValueStore", "--initial", "1M")
    config = tomllib.loads(first.stdout)
    assert not {"memory", "page-size", "fill", "access"} & set(config)
    assert (config["device-id"], config["bar2-size"], config["initial"]) == (0x4B56, "1M", "1M")
    file.write_text(first.stdout)
    assert serve("--print-config", "--config", str(file)).stdout == first.stdout
    file.write_text(first.stdout + 'fill = "1"\n')
    assert ': fill = "1": KeyValueStore decides this itself' in error_of("--config", str(file))


def test_a_memory_with_a_name_is_not_dropped_by_a_class_that_takes_none(tmp_path: Path) -> None:
    """Such as one that has a memory of the size that the user says, and no more."""
    (tmp_path / "sized.py").write_text(
        "from vfu_dev.device import Device, Region\n"
        "class Sized(Device):\n"
        "    initial_limit_bytes = 8192\n"
        "    def __init__(self, name=None, *, memory_bytes=4096):\n"
        "        self.memory = Region(2, size_bytes=memory_bytes)\n"
        "        super().__init__(name)\n"
    )
    device = ("--device", f"{tmp_path}/sized.py:Sized")
    assert printed(*device, "--memory", "3M")["initial"] == "8K"
    config = printed(*device, "--memory", "3M", "--initial", "1M")
    assert (config["bar2-size"], config["initial"]) == ("4M", "1M")
    text = error_of(*device, "--memory", "3M", "--memory", "aux=1M")
    assert text == "--memory NAME=SIZE: Sized decides this itself"


def test_several_memories_are_a_list(file: Path) -> None:
    file.write_text('memory = ["2M", "aux=1M,bar=4,access=mmap"]\n')
    config = printed("--config", str(file))
    assert config["memory"] == ["2M", "aux=1M,bar=4,access=mmap"]
    assert (config["bar2-size"], config["bar4-size"], config["bar1-size"]) == ("2M", "1M", "4K")
    assert printed("--config", str(file), "--memory", "4M")["memory"] == ["4M"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('# a\n\nmemroy = "1M"', ":3: memroy: no such key; did you mean memory?"),
        ("page_size = 4096", ":1: page_size: no such key; did you mean page-size?"),
        ("qqq = 1", ":1: qqq: no such key; the keys are: socket, fd,"),
        ('name = "a"\naccess = "dma"', ':2: access = "dma": expected one of trap, mmap'),
        ('initial = "10Q"', ':1: initial = "10Q": expected a size such as 4096, 64K, 16M, 1G'),
        ("vendor-id = 70000", ":1: vendor-id = 70000: expected a number from 0 to 65535"),
        ("vendor-id = 1.5", ":1: vendor-id = 1.5: expected a number from 0 to 65535"),
        ("metrics-port = -1", ":1: metrics-port = -1: expected a number from 0 to 65535"),
        ('name = ""', ':1: name = "": expected text (this is empty)'),
        ('socket = ""', ':1: socket = "": expected a path (this is empty)'),
        ("socket = [1]", ":1: socket = [1]: expected a path (this is a list)"),
        ("socket = 1.5", ":1: socket = 1.5: expected a path (this is a number with a fraction)"),
        ("socket = {a = 1}", ':1: socket = {"a": 1}: expected a path (this is a table)'),
        ("socket = 1979-05-27", "expected a path (this is a date or time)"),
        ('socket = "a\\u0000b"', "expected a path (this has a NUL character)"),
        ('name = "a\\nb"', r"device: name 'a\nb': control characters are not allowed in a name"),
        ('name = "\\u001b[2J"', r"device: name '\x1b[2J': control characters"),
        ('memory = "=64K"', "--memory =64K: memory: a name is missing"),
        ("fill = -1", "fill -1: expected a seed from 0 to 0xffffffffffffffff"),
        ('fill = "0x10000000000000000"', "fill 18446744073709551616: expected a seed"),
        (f"vendor-id = 0x{'f' * 5000}", ":1: vendor-id = (huge): expected a number from 0 to 65535"),
        (f"vendor-id = {'9' * 5000}", "is not TOML"),
        ("name = " + "[" * 100_000, "is nested too deeply"),
        ("[ids]\nvendor = 1", ":1: ids: no such key"),
        ("[name]\nx = 1", ":1: name = "),
        ('memory = "10Q"', ':1: memory = "10Q"'),
        ('memory = "10K"', ':1: memory = "10K"'),
        ('name = "x"\npage-size = "6K"', ':2: page-size = "6K"'),
        ("page-size = 512", ":1: page-size = 512"),
        ('fill = "seed"', ':1: fill = "seed"'),
        ("bar0-size = 100", ":1: bar0-size = 100"),
        ('bar5-size = "4K"', ":1: bar5-size"),
        ("name = ", "is not TOML"),
    ],
)
def test_an_error_names_file_line_and_key(file: Path, content: str, expected: str) -> None:
    file.write_text(content)
    text = error_of("--config", str(file))
    assert (f"{file}{expected}" if expected.startswith(":") else expected) in text
    assert str(file) in text


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "none.toml: cannot be read: No such file" in error_of("--config", str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    assert "is not UTF-8" in error_of("--config", str(tmp_path / "latin.toml"))


def test_a_byte_order_mark_is_skipped(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbfname = "windows"\r\n')
    assert printed("--config", str(file))["name"] == "windows"


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.toml"
    os.mkfifo(fifo)
    assert error_of("--config", str(fifo)) == f"{fifo}: is not a file"
    assert error_of("--config", "/dev/zero") == "/dev/zero: is not a file"
    assert "cannot be read: Is a directory" in error_of("--config", str(tmp_path))
    large = tmp_path / "large.toml"
    with large.open("wb") as made:
        made.truncate(1 << 40)
    assert error_of("--config", str(large)) == f"{large}: has more than 1 MiB"


def test_what_a_shell_passes_from_a_command_is_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, b'name = "piped"\n')
    os.close(writer)
    try:
        assert printed("--config", f"/dev/fd/{reader}")["name"] == "piped"
    finally:
        os.close(reader)


def test_errors_of_the_command_line_do_not_blame_the_file(file: Path) -> None:
    file.write_text('name = "x"\nmemory = "1M"\n')
    text = error_of("--config", str(file), "--bar0-size", "100")
    assert text == "bar0-size: registers: expected a power of two of at least 4096 bytes, not 100"


def test_a_socket_is_needed_to_serve_and_may_come_from_the_file(file: Path) -> None:
    result = serve()
    assert result.exit_code == 2
    assert "Missing option '--socket'" in result.output
    file.write_text('socket = "/run/dev.sock"')
    assert printed("--config", str(file))["socket"] == "/run/dev.sock"


@pytest.mark.parametrize("count", [0, 1, 4096, 5000, 1 << 20, 3 << 30, (1 << 30) + 1024])
def test_a_printed_size_is_exact(count: int) -> None:
    assert parse_size(exact_size(count)) == count

"""Configuration space: masks, hooks, reset, and what of it migrates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_dev.device.config_space import ConfigSpace
from vfu_dev.errors import StreamError


def space(*, writable: int = 0x0F0F) -> ConfigSpace:
    config = ConfigSpace()
    config.register("command", 4, 2, 0x1234, writable)
    config.register("fixed", 8, 4, 0xDEADBEEF)
    return config


def write(config: ConfigSpace, offset: int, data: bytes) -> None:
    config.write(offset, memoryview(bytearray(data)))


def test_only_writable_bits_change() -> None:
    config = space()
    write(config, 4, b"\xff\xff")
    assert config["command"] == 0x1234 | 0x0F0F
    write(config, 0, bytes(256))
    assert config["command"] == 0x1234 & ~0x0F0F
    assert config["fixed"] == 0xDEADBEEF


@given(st.integers(0, 12), st.binary(min_size=1, max_size=8))
def test_a_write_of_any_width_does_what_single_bytes_do(offset: int, data: bytes) -> None:
    wide, narrow = space(writable=0x5A5A), space(writable=0x5A5A)
    write(wide, offset, data)
    for at, byte in enumerate(data, offset):
        write(narrow, at, bytes([byte]))
    contents = []
    for config in (wide, narrow):
        out = bytearray(32)
        config.read(0, memoryview(out))
        contents.append(bytes(out))
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("offset", "data", "expected"),
    [
        (4, b"\x01\x80", [(0x1234, 0x8001)]),
        (5, b"\x80", [(0x1234, 0x8000)]),  # the upper byte alone
        (2, b"\xff\xff\x80", [(0x1234, 0x80)]),  # begins before it
        (4, b"\x00\x80\xff\xff", [(0x1234, 0x8000)]),  # ends after it
        (6, b"\xff", []),
        (3, b"\xff", []),
    ],
)
def test_a_hook_sees_what_was_written_to_its_register(
    offset: int, data: bytes, expected: list[tuple[int, int]]
) -> None:
    config = space()
    seen = []
    config.on_write("command", lambda before, written: seen.append((before, written)))
    write(config, offset, data)
    assert seen == expected


def test_reset_brings_back_the_first_values() -> None:
    config = space()
    config["fixed"] = 1
    write(config, 4, b"\xff\xff")
    config.reset()
    assert (config["command"], config["fixed"]) == (0x1234, 0xDEADBEEF)


def test_the_writable_bits_migrate() -> None:
    """What only the destination knows, as ids that its command line changed, stays its own."""
    source, target = space(), space()
    target["fixed"] = 7
    write(source, 4, b"\x0f\x00")
    content = source.block().pack_slot()
    target.block().validate_slot(content)
    target.block().unpack_slot(content)
    assert (target["command"], target["fixed"]) == (source["command"], 7)


def test_bits_that_do_not_exist_here_are_refused() -> None:
    source, target = space(writable=0xFFFF), space()
    write(source, 4, b"\xff\xff")
    with pytest.raises(StreamError, match=r"command has bits 0xf0f0"):
        target.block().validate_slot(source.block().pack_slot())


def test_a_stream_without_configuration_space_changes_nothing() -> None:
    """It comes from a version that had none, or from a device that nobody serves."""
    target = space()
    write(target, 4, b"\x0f\x00")
    before = target["command"]
    for content in (target.block().missing_content(), ConfigSpace().block().pack_slot()):
        assert content is not None
        target.block().validate_slot(content)
        target.block().unpack_slot(content)
        assert target["command"] == before

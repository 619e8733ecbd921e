"""Tables of registers: what a hook gets, what a guest reads, and which tables are refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from vfu_dev.device import Access, Bar, Device, Field, Msix, Region, Registers
from vfu_dev.errors import ConfigError
from vfu_dev.testing import InMemoryClient

INTEGERS = ("<u1", "u1", "<u2", "<u4", "<u8", "<i1", "<i2", "<i4", "<i8")
PLAIN = ("V1", "V3", "V8", "V256")


def bounds(form: str) -> tuple[int, int]:
    """Return the least and the greatest value of an integer format."""
    info = np.iinfo(form)
    return int(info.min), int(info.max)


def made(fields: list[Field]) -> Registers:
    """Return the registers of a device that has nothing else."""

    class Table(Device):
        table = Registers(0, fields)

    return Table().table


class Watched:
    """One register at 0x10 whose hook notes what it gets."""

    def __init__(self, form: str, access: str) -> None:
        self.seen: list[Any] = []
        self.size = np.dtype(form).itemsize
        self.bar = made([Field("it", 0x10, form, access, "")])
        if access == "intx":
            self.bar.on_acknowledge("it", self.seen.append)
        elif access != "ro":
            self.bar.on_write("it", self.seen.append)

    def write(self, data: bytes, at: int = 0) -> None:
        """Write to the register as a guest does; `data` is dead afterwards."""
        buffer = bytearray(data)
        self.bar.write(0x10 + at, memoryview(buffer))
        buffer[:] = b"\xaa" * len(buffer)

    def read(self) -> bytes:
        """Return what a guest reads."""
        out = bytearray(self.size)
        self.bar.read(0x10, memoryview(out))
        return bytes(out)


@pytest.mark.parametrize("access", ["rw", "wo"])
@pytest.mark.parametrize("form", INTEGERS)
def test_a_hook_gets_a_python_integer_whatever_the_access(form: str, access: str) -> None:
    register = Watched(form, access)
    values = [0, 1, *bounds(form)]
    for value in values:
        register.write(value.to_bytes(register.size, "little", signed=value < 0))
    assert register.seen == values
    assert {type(value) for value in register.seen} == {int}
    # What an author does with it: nothing wraps, nothing overflows.
    greatest = register.seen[-1]
    assert greatest + 1 == bounds(form)[1] + 1
    assert greatest << 8 == bounds(form)[1] * 256
    assert json.loads(json.dumps(greatest)) == greatest
    assert register.read() == (
        bytes(register.size) if access == "wo" else register.bar.values["it"].tobytes()
    )


@pytest.mark.parametrize("access", ["rw", "wo"])
@pytest.mark.parametrize("form", PLAIN)
def test_a_hook_of_plain_bytes_gets_bytes_that_it_may_keep(form: str, access: str) -> None:
    register = Watched(form, access)
    content = bytes(range(1, register.size)) + b"\0"
    register.write(content)
    assert register.seen == [content]
    assert type(register.seen[0]) is bytes


@pytest.mark.parametrize("form", ["<u4", "<u8"])
def test_an_acknowledgement_is_a_python_integer(form: str) -> None:
    register = Watched(form, "intx")
    register.write(b"\x05", at=1)
    assert register.seen == [0x500]
    assert type(register.seen[0]) is int


@pytest.mark.parametrize(("form", "zero", "new"), [("<u4", 0x1122, 0x55661122), ("<i2", -2, 0x55FE)])
def test_a_write_to_a_part_keeps_the_rest_of_what_is_stored(form: str, zero: int, new: int) -> None:
    stored, passed = Watched(form, "rw"), Watched(form, "wo")
    half = stored.size // 2
    for register in (stored, passed):
        register.bar["it"] = zero if register is stored else 0
        register.write(b"\x66\x55"[-half:], at=half)
    assert stored.seen == [new]
    assert passed.seen == [new & ~((1 << 8 * half) - 1)]  # reads zero, so the rest is zero


@pytest.mark.parametrize(
    ("form", "access"),
    [
        *((form, access) for form in INTEGERS for access in Access if access is not Access.INTX),
        ("<u4", Access.INTX),
        ("<u8", Access.INTX),
    ],
)
def test_a_table_gives_and_takes_python_integers(form: str, access: Access) -> None:
    register = Watched(form, access)
    for value in bounds(form):
        register.bar["it"] = value
        assert register.bar["it"] == value
        assert type(register.bar["it"]) is int
        register.bar["it"] = np.dtype(form).type(value)
        assert register.bar["it"] == value
    for wrong in (bounds(form)[0] - 1, bounds(form)[1] + 1, 1 << 200):
        with pytest.raises(OverflowError, match=r"register it: .* does not fit in"):
            register.bar["it"] = wrong
    for wrong in (1.0, "1", b"1"):
        with pytest.raises(TypeError, match="register it"):
            register.bar["it"] = wrong  # type: ignore[assignment]
    assert register.bar["it"] == bounds(form)[1]
    assert not register.seen


@pytest.mark.parametrize("form", PLAIN)
def test_a_table_gives_and_takes_plain_bytes(form: str) -> None:
    register = Watched(form, "rw")
    register.bar["it"] = b"\x07"
    assert register.bar["it"] == b"\x07".ljust(register.size, b"\0")
    with pytest.raises(OverflowError, match="register it"):
        register.bar["it"] = bytes(register.size + 1)
    with pytest.raises(TypeError, match="register it"):
        register.bar["it"] = 7


def test_a_register_that_does_not_exist_is_a_key_error() -> None:
    bar = Watched("<u4", "rw").bar
    with pytest.raises(KeyError, match="that"):
        bar["that"] = 1
    with pytest.raises(KeyError, match="that"):
        bar["that"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"access": "r/w"}, "register it: access 'r/w': expected one of ro, rw, wo, intx"),
        ({"access": "RW"}, "register it: access 'RW'"),
        ({"access": None}, "register it: access None"),
        ({"format": ">u4"}, "register it: format '>u4': registers are little endian"),
        ({"format": ">i8"}, "little endian"),
        ({"format": "<u3"}, "register it: format '<u3'"),
        ({"format": "word"}, "register it: format 'word'"),
        ({"format": ""}, "register it: format ''"),
        ({"format": "<f4"}, "register it: format '<f4': expected an integer such as <u4, or V256"),
        ({"format": "?"}, "expected an integer"),
        ({"format": "S8"}, "expected an integer"),
        ({"format": "O"}, "expected an integer"),
        ({"format": "(4,)<u4"}, "expected an integer"),
        ({"format": "<u4,<u4"}, "expected an integer"),
        ({"format": "V"}, "expected an integer"),
        ({"format": None}, "expected an integer"),
        (
            {"format": "<u2", "access": "intx"},
            "register it: format '<u2': the causes of INTx need <u4 or <u8",
        ),
        ({"format": "V4", "access": "intx"}, "the causes of INTx"),
        ({"offset": -4}, "register it: offset -4"),
        ({"offset": 1.5}, "register it: offset 1.5"),
        ({"offset": "0x10"}, "register it: offset '0x10'"),
        ({"name": ""}, "a register needs a name"),
        ({"default": 1 << 32}, "register it: 4294967296 does not fit in <u4 (default)"),
        ({"default": b"1"}, "register it (<u4): "),
        ({"format": "V2", "default": b"123"}, "does not fit in V2 (default)"),
    ],
)
def test_a_field_that_cannot_be_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    good = {"name": "it", "offset": 0x10, "format": "<u4", "access": "rw", "doc": "", "migrates": True}
    Field(**good)
    with pytest.raises(ConfigError) as caught:
        Field(**good | changes)
    assert text in str(caught.value)


def test_an_access_can_be_written_as_text_or_as_what_it_is() -> None:
    fields = [Field("it", 0, "<u4", access, "") for access in ("rw", Access.READ_WRITE)]
    assert fields[0] == fields[1]
    assert all(field.access is Access.READ_WRITE for field in fields)


def field(name: str, offset: int, form: str = "<u4") -> Field:
    return Field(name, offset, form, "rw", "")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ([field("a", 0), field("b", 2)], "register b at 0x2 overlaps a, which ends at 0x4"),
        ([field("b", 4), field("a", 0, "V256")], "register b at 0x4 overlaps a, which ends at 0x100"),
        ([field("a", 8), field("b", 8)], "register b at 0x8 overlaps a"),
        ([field("a", 0), field("a", 8)], "two registers with the name a"),
        ([field("a", 4094)], "register a ends at 0x1002, beyond the BAR of 4096 bytes"),
        ([field("a", 1 << 40)], "register a ends at"),
    ],
)
def test_a_table_that_cannot_be_is_refused_with_the_names(fields: list[Field], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Registers(0, fields)


def test_registers_may_touch_and_come_in_any_order() -> None:
    bar = made([field("b", 4), field("a", 0), field("c", 4092)])
    bar.write(0, memoryview(b"\1\0\0\0\2\0\0\0"))
    assert (bar["a"], bar["b"], list(bar.fields)) == (1, 2, ["b", "a", "c"])


@pytest.mark.parametrize("access", ["ro", "intx"])
def test_a_hook_that_no_write_would_call_is_refused(access: str) -> None:
    """By the class that declares it, and by a device of its own."""
    fields = [Field("it", 0, "<u4", access, "")]
    for hooked in (Registers(0, fields).written, lambda name: made(fields).on_write(name, lambda _: None)):
        with pytest.raises(ConfigError, match=f"a hook for register it, which is {access}"):
            hooked("it")


def test_an_initial_value_has_to_fit() -> None:
    with pytest.raises(ConfigError, match=r"register a: -1 does not fit in <u4 \(initial\)"):
        Registers(0, [field("a", 0)], initial={"a": -1})

    class Given(Device):
        registers = Registers(0, [field("a", 0), field("b", 8, "V4")], initial={"a": 7, "b": b"VFUD"})

    with InMemoryClient(Given()) as client:
        client.region_write(0, 0, bytes(12))
        client.reset()
        assert client.region_read(0, 0, 12) == b"\7\0\0\0\0\0\0\0VFUD"


def test_nothing_lies_under_the_upper_half_of_a_64_bit_bar() -> None:
    class Under(Device):
        memory = Region(0, size_bytes=4096)
        registers = Registers(1, [field("a", 0)])

    class Over(Device):
        registers = Registers(3, [field("a", 0)])
        memory = Region(2, size_bytes=4096)

    with pytest.raises(ConfigError, match="Under: memory and registers both need BAR1: memory is 64-bit"):
        Under()
    with pytest.raises(ConfigError, match="Over: registers and memory both need BAR3: memory is 64-bit"):
        Over()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Region(5, size_bytes=4096), "bar needs BAR6, which does not exist"),
        (lambda: Registers(6, [field("a", 0)]), "bar needs BAR6"),
        (lambda: Msix(-1, vectors=1), "bar needs BAR-1"),
    ],
)
def test_there_are_six_bars(make: Any, text: str) -> None:
    kind = type("Made", (Device,), {"bar": make()})
    kind.bar.__set_name__(kind, "bar")
    with pytest.raises(ConfigError, match=text):
        kind()


def test_six_bars_beside_each_other_are_fine() -> None:
    class Six(Device):
        first = Region(0, size_bytes=4096)
        second = Region(2, size_bytes=4096)
        third = Registers(4, [field("a", 0)])
        fourth = Registers(5, [field("b", 0)])

    device = Six()
    taken = [number for bar in device.bars for number in bar.bar_registers]
    assert all(isinstance(bar, Bar) for bar in device.bars)
    assert sorted(taken) == list(range(6))
    device.close()

"""Streams between versions of a device: what is taken, what is refused, and what the refusal names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vfu_dev.device import NO_BAR, Bar, Device, Field, Region, Registers
from vfu_dev.errors import ConfigError, StreamError
from vfu_dev.memory import DeviceMemory
from vfu_dev.migration import MigratableState, Migration, RegisterBlock, StateObject, stream
from vfu_dev.migration.compat import judge_schema
from vfu_dev.uapi import DeviceState as S

PAGE = 4096


class Version(Device):
    """A device whose parts a test chooses."""

    type_name = "versioned"

    def __init__(
        self,
        fields: Sequence[Field],
        *,
        memories: Sequence[str] = ("m",),
        objects: Sequence[StateObject] = (),
        added: Sequence[str] = (),
        dropped: Sequence[str] = (),
    ) -> None:
        self.objects = objects
        self.added_state, self.dropped_state = added, dropped  # type: ignore[misc]
        self.registers = Registers(0, fields)
        self.regions = {
            name: Region(NO_BAR if number else 2, size_bytes=8 * PAGE) for number, name in enumerate(memories)
        }
        super().__init__("v")

    def declarations(self) -> dict[str, Bar]:
        """Add the memories."""
        return super().declarations() | self.regions

    def state_objects(self) -> Sequence[StateObject]:
        """Return what the test gave."""
        return self.objects


def register(name: str, offset: int, form: str = "<u4", default: int | None = None) -> Field:
    return Field(name, offset, form, "rw", "of a test", migrates=True, default=default)


A, B, C = register("a", 0), register("b", 8, "<u8"), register("c", 16)


def move(source: Device, target: Device) -> None:
    """Migrate, and check that both ends agree about what was moved."""
    migration = source.migration
    migration.set_state(S.STOP_COPY)
    buffer = bytearray(1 << 20)
    count = migration.read_into(memoryview(buffer))
    migration.set_state(S.RUNNING)
    target.migration.set_state(S.RESUMING)
    target.migration.write(memoryview(buffer)[:count])
    target.migration.set_state(S.RUNNING)
    saved, resumed = migration.save_status(), target.migration.resume_status()
    assert saved is not None
    assert resumed is not None
    assert saved["digest"] == resumed["digest"]


def test_added_fields_get_their_defaults_wherever_fields_lie() -> None:
    old = Version([A, B])
    new = Version([register("d", 0x40, default=77), register("b", 0x100, "<u8"), register("a", 0x80)])
    old.registers["a"], old.registers["b"] = 5, 1 << 50
    old.memories[0].store(3 * PAGE, b"content")
    new.registers["d"] = 1
    move(old, new)
    assert [new.registers[name] for name in "abd"] == [5, 1 << 50, 77]
    assert bytes(new.memories[0].raw[3 * PAGE : 3 * PAGE + 7]) == b"content"


@pytest.mark.parametrize(
    ("source", "target", "named"),
    [
        ({"fields": [A]}, {"fields": [A, B]}, r"field b: new here, and no default was declared"),
        ({"fields": [A, B]}, {"fields": [A]}, r'registers registers: field "b": not here any more'),
        ({"fields": [A]}, {"fields": [register("a", 0, "<i4")]}, r'field a: here "<i4", in the stream "<u4"'),
        (
            {"fields": [A], "memories": ("m", "n")},
            {"fields": [A]},
            r'memory "n": not here any more',
        ),
        (
            {"fields": [A]},
            {"fields": [A], "memories": ("m", "n")},
            r"memory n: new here, and no default was declared",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    source: dict[str, Any], target: dict[str, Any], named: str
) -> None:
    """In the first message, while the source still runs, and before anything was stored."""
    old, new = Version(**source), Version(**target)
    prelude = stream.PRELUDE.size + len(old.migration.contents.schema)
    old.migration.set_state(S.PRE_COPY)
    buffer = bytearray(prelude)
    assert old.migration.read_into(memoryview(buffer)) == prelude
    new.migration.set_state(S.RESUMING)
    with pytest.raises(StreamError, match=named):
        new.migration.write(memoryview(buffer))
    assert old.migration.state is S.PRE_COPY


def test_all_that_does_not_fit_is_named_at_once() -> None:
    old, new = Version([A, B], memories=("m", "n")), Version([C], memories=("m", "o"))
    with pytest.raises(StreamError) as caught:
        judge_schema(new.migration.contents, old.migration.contents.schema)
    for name in ("field c", '"a"', '"b"', 'memory "n"', "memory o"):
        assert name in str(caught.value)


def test_an_author_may_drop_fields_memories_and_objects() -> None:
    """What was dropped is still part of the digest that both ends compare."""
    note = StateObject("note", lambda: b"old", lambda _: None, 10)
    old = Version([A, B], memories=("m", "gone"), objects=[note])
    old.registers["a"] = 9
    old.memories[1].store(0, b"x" * 3 * PAGE)
    old.memories[1].store(PAGE, bytes(PAGE))
    new = Version([A], dropped=("registers.b", "gone", "note"))
    move(old, new)
    assert new.registers["a"] == 9


def test_added_memories_start_as_zeros_and_added_objects_with_their_default() -> None:
    got: list[bytes] = []
    note = StateObject("note", lambda: b"", got.append, 10, default=b"none yet")
    old, new = Version([A]), Version([A], memories=("m", "more"), objects=[note], added=("more",))
    new.memories[1].store(0, b"before")
    move(old, new)
    assert not new.memories[1].data.any()
    assert got == [b"none yet"]


def test_objects_travel_in_slots_of_constant_size() -> None:
    """Whatever the object holds, stop_copy_length is what it was."""
    queue = ["one"]
    taken: list[str] = []
    source = Version([A], objects=[text_object(queue, taken)])
    before = source.migration.stop_copy_length()
    queue += ["two", "three"]
    assert source.migration.stop_copy_length() == before
    move(source, Version([A], objects=[text_object([], taken)]))
    assert taken == ["one", "two", "three"]


def text_object(queue: list[str], taken: list[str], **changes: Any) -> StateObject:
    """Return a queue of words as an author would declare it."""

    def validate(content: bytes) -> None:
        if content.count(b",") > 4:
            raise ValueError("more than five words")

    values: dict[str, Any] = {
        "pack": lambda: ",".join(queue).encode(),
        "unpack": lambda content: taken.extend(content.decode().split(",")),
        "validate": validate,
        "max_bytes": 40,
    }
    return StateObject("queue", **{**values, **changes})


def test_an_object_too_large_fails_the_save_and_one_not_valid_the_resume() -> None:
    source = Version([A], objects=[text_object(["x" * 41], [])])
    source.migration.set_state(S.STOP_COPY)
    with pytest.raises(ConfigError, match="object queue: 41 bytes, declared were 40"):
        source.migration.read_into(memoryview(bytearray(1 << 20)))
    source.migration.reset(S.RUNNING, "test")
    source, target = (Version([A], objects=[text_object(list("abcdefg"), taken := [])]) for _ in range(2))
    with pytest.raises(StreamError, match="object queue: more than five words"):
        move(source, target)
    assert taken == []


def test_objects_of_older_versions_are_upgraded_and_newer_ones_refused() -> None:
    taken: list[str] = []
    upper = text_object(
        [], taken, version=2, accepts=(1,), upgrade=lambda content, version: content.upper() * version
    )
    old, new = Version([A], objects=[text_object(["abc"], [])]), Version([A], objects=[upper])
    move(old, new)
    assert taken == ["ABC"]
    with pytest.raises(StreamError, match=r"object queue: version: here \[1\], in the stream 2"):
        move(new, old)
    with pytest.raises(ConfigError, match="cannot upgrade"):
        text_object([], [], accepts=(0,))


def test_a_smaller_slot_still_takes_what_fits() -> None:
    taken: list[str] = []
    small = text_object([], taken, max_bytes=5)
    move(Version([A], objects=[text_object(["abc"], [])]), Version([A], objects=[small]))
    assert taken == ["abc"]
    with pytest.raises(StreamError, match="7 bytes, declared are 5"):
        move(Version([A], objects=[text_object(["abcdefg"], [])]), Version([A], objects=[small]))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(memories=[{**s["memories"][0], "size_bytes": 1 << 60}]),
        lambda s: s.update(memories=[{**s["memories"][0], "size_bytes": -4096}]),
        lambda s: s.update(memories=[{**s["memories"][0], "size_bytes": True}]),
        lambda s: s.update(memories=[{**s["memories"][0], "page_size_bytes": 0}]),
        lambda s: s.update(memories=[{"name": "gone", "size_bytes": 1 << 50, "page_size_bytes": 4096}]),
        lambda s: s.update(memories=s["memories"] * 2),
        lambda s: s.update(memories=s["memories"] * 1000),
        lambda s: s.update(memories={"m": 1}),
        lambda s: s.update(memories=None),
        lambda s: s["registers"][0].update(size_bytes=1 << 40),
        lambda s: s["registers"][0].update(size_bytes=2),
        lambda s: s["registers"][0].update(dtype=[["a", "<u4", 1 << 30]]),
        lambda s: s["registers"][0].update(dtype=[["a", "<u4", "x"]]),
        lambda s: s["registers"][0].update(dtype=[["a"]]),
        lambda s: s["registers"][0].update(dtype="|V4"),
        lambda s: s["registers"][0].pop("dtype"),
        lambda s: s["registers"][0].update(name=["registers"]),
        lambda s: s.update(extra=1),
        lambda s: s.update(device="another"),
        lambda s: s.clear(),
    ],
)
def test_a_hostile_schema_is_refused_in_words(change: Any) -> None:
    """Numbers from the stream are judged before anything is allocated or sliced by them."""
    device = Version([A], dropped=("gone",))
    schema = json.loads(device.migration.contents.schema)
    change(schema)
    with pytest.raises(StreamError, match="stream"):
        judge_schema(device.migration.contents, json.dumps(schema).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"1", b"\xff", b"{", b"[" * 60000, b"null", b'"x"'])
def test_what_is_no_schema_is_refused(text: bytes) -> None:
    with pytest.raises(StreamError, match="schema"):
        judge_schema(Version([A]).migration.contents, text)


def test_defaults_for_fields_that_do_not_exist_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="defaults for unknown fields"):
        RegisterBlock("r", np.dtype([("a", "<u4")]), bytes, lambda _: None, defaults={"b": 1})


def test_memories_larger_than_4_gib_migrate() -> None:
    """Two of 5 and 6 GiB, with pages at both ends; what was never touched costs nothing."""

    def big() -> tuple[list[DeviceMemory], Migration]:
        memories = [DeviceMemory("a", 5 << 30), DeviceMemory("b", 6 << 30, 1 << 16)]
        return memories, Migration("big", MigratableState("big", memories, []))

    (ours, source), (theirs, target) = big(), big()
    for memory in ours:
        memory.store(0, b"first")
        memory.store(memory.size_bytes - 4, b"last")
    source.set_state(S.STOP_COPY)
    buffer = bytearray(1 << 20)
    count = source.read_into(memoryview(buffer))
    assert source.read_into(memoryview(bytearray(10))) == 0
    target.set_state(S.RESUMING)
    target.write(memoryview(buffer)[:count])
    target.set_state(S.RUNNING)
    for memory in theirs:
        assert bytes(memory.raw[:5]) == b"first"
        assert bytes(memory.raw[-4:]) == b"last"
        assert sum(map(len, memory.allocated_pages())) * memory.page_size_bytes <= 4 << 20
        memory.close()

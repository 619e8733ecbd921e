"""Device classes as their authors write them: what is declared, what each device gets, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vfu_dev.device import Device, Field, Msix, MsixBar, PciIdentity, Region, RegisterBar, Registers
from vfu_dev.device.declare import OutsideRegionError
from vfu_dev.device.loader import find_class, make_device
from vfu_dev.device.reference import MemorySpec, ReferenceDevice
from vfu_dev.errors import REFUSALS, ConfigError
from vfu_dev.migration.engine import ALL_FLAGS
from vfu_dev.testing import InMemoryClient, move
from vfu_dev.uapi import MigrationFlags


class Counter(Device):
    """Registers, memory that migrates, memory that does not, interrupts."""

    registers = Registers(
        0,
        [Field("add", 0, "<u4", "wo", "added"), Field("sum", 4, "<u4", "ro", "of all", migrates=True)],
        initial={"sum": 100},
    )
    notes = Region(2, size_bytes=3 * 4096)
    msix = Msix(1, vectors=2)
    cache = Region(4, size_bytes=4096, migrate=False)

    @registers.written("add")
    def add(self, value: int) -> None:
        """Add, and say so."""
        self.registers["sum"] += value
        self.raise_irq(1)


def test_each_device_has_its_own_of_what_the_class_declares() -> None:
    with InMemoryClient(Counter("one")) as one, InMemoryClient(Counter("two")) as two:
        one.region_write(0, 0, b"\x05\0\0\0")
        assert one.region_read(0, 4, 4) == b"\x69\0\0\0"
        assert two.region_read(0, 4, 4) == b"\x64\0\0\0"
        assert (one.irqs, two.irqs) == ([1], [])
        assert isinstance(one.device.bars[0], RegisterBar)
        assert isinstance(Counter.registers, Registers)
        assert [bar.index for bar in one.device.bars] == [0, 2, 1, 4]


def test_a_reset_returns_registers_to_what_was_declared_and_leaves_memory() -> None:
    with InMemoryClient(Counter()) as client:
        client.region_write(0, 0, b"\x05\0\0\0")
        client.region_write(2, 0, b"note")
        client.reset()
        assert client.region_read(0, 4, 1) == b"\x64"
        assert client.region_read(2, 0, 4) == b"note"


def test_memory_migrates_unless_it_is_declared_not_to() -> None:
    with InMemoryClient(Counter("one")) as one, InMemoryClient(Counter("two")) as two:
        one.region_write(2, 4096, b"note")
        one.region_write(4, 0, b"cached")
        move(one, two)
        assert two.region_read(2, 4096, 4) == b"note"
        assert two.region_read(4, 0, 6) == bytes(6)


def test_what_lies_beyond_the_memory_is_not_the_authors_business() -> None:
    asked: list[tuple[int, int]] = []

    class Spy(Device):
        notes = Region(2, size_bytes=3 * 4096)

        def region_write(self, region: Region, offset: int, data: memoryview) -> None:
            asked.append((offset, len(data)))

        def region_read(self, region: Region, offset: int, out: memoryview) -> None:
            asked.append((offset, len(out)))

    with InMemoryClient(Spy()) as client:
        end = 3 * 4096
        client.region_write(2, end - 2, b"1234")
        client.region_write(2, end, b"1234")
        assert client.region_read(2, end - 1, 4) == b"\0\xff\xff\xff"
        assert asked == [(end - 2, 2), (end - 1, 1)]


def test_a_mapped_region_is_not_the_devices_to_answer_for() -> None:
    class Mapped(Device):
        notes = Region(2, size_bytes=8192, mapped=True)

    class Asking(Mapped):
        def region_write(self, region: Region, offset: int, data: memoryview) -> None:
            region.store(offset, data)

    device = Mapped()
    assert device.memories[0].mapped
    device.close()
    with pytest.raises(ConfigError, match="notes: a mapped region"):
        Asking()


def test_a_subclass_can_change_a_hook_and_replace_what_is_declared() -> None:
    class Twice(Counter):
        notes = Region(2, size_bytes=8 * 4096)

        def add(self, value: int) -> None:
            super().add(2 * value)

    with InMemoryClient(Twice()) as client:
        client.region_write(0, 0, b"\x05\0\0\0")
        assert client.region_read(0, 4, 1) == b"\x6e"
        assert [memory.size_bytes for memory in client.device.memories] == [8 * 4096]


def test_a_wrong_register_name_fails_when_the_class_is_made() -> None:
    with pytest.raises(ConfigError, match="no register 'ad'; did you mean 'add'"):
        Counter.registers.written("ad")
    with pytest.raises(ConfigError, match="no register 'x'"):
        Registers(0, [], initial={"x": 1})


def test_a_device_is_complete_when_it_was_made() -> None:
    device = Counter()
    with pytest.raises(ConfigError, match="after `finish`"):
        device.add_bar(RegisterBar(5, "late", 4096, [], {}))
    with pytest.raises(AttributeError, match="declared by the class"):
        device.registers = device.registers
    device.close()


def test_a_device_that_misses_its_own_region_has_a_defect() -> None:
    """An IndexError with its facts, neither a ConfigError nor the refusal of a peer; nothing is written."""
    device = Counter()
    for offset, count in ((2 * 4096, 4097), (3 * 4096, 1), (-1, 1), (1 << 70, 0)):
        with pytest.raises(IndexError, match=f"notes: {count} bytes at ") as caught:
            device.notes.store(offset, bytes(count))
        assert isinstance(caught.value, OutsideRegionError)
        assert not isinstance(caught.value, (*REFUSALS, ConfigError))
        assert (caught.value.region, caught.value.offset, caught.value.count) == ("notes", offset, count)
    for offset, count in ((-4, 4), (0, -4)):
        with pytest.raises(IndexError, match="notes"):
            device.notes.read(offset, count)
    assert device.notes.memory.written_bytes == 0
    assert device.notes.read(3 * 4096 - 1, 4) == b"\0"
    device.close()


def test_a_name_has_no_control_characters() -> None:
    device = Counter("one")
    with pytest.raises(ConfigError, match=r"device: name 'a\\nb': control characters"):
        device.name = "a\nb"
    assert device.name == "one"
    device.close()
    with pytest.raises(ConfigError, match="control characters"):
        Counter("\x1b[31m")
    with pytest.raises(ConfigError, match="control characters"):
        make_device(Counter, "\r", ALL_FLAGS, {}, {})
    for name in ("", "a\tb"):
        with pytest.raises(ConfigError, match="memory: "):
            MemorySpec(name, 4096)


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1 << 200])
def test_a_seed_that_would_wrap_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"fill .*: expected a seed from 0 to 0xffffffffffffffff"):
        ReferenceDevice(memory_bytes=4096, fill_seed=seed)
    with InMemoryClient(ReferenceDevice(memory_bytes=4096, fill_seed=(1 << 64) - 1)) as client:
        assert client.region_read(0, 0x10, 8) == b"\xff" * 8


def test_identity_and_type_have_defaults() -> None:
    device = Counter()
    assert (device.name, device.type_name) == ("Counter", "Counter")
    assert device.identity.subsystem_ids == (0x4656, 0xFFFF)
    assert PciIdentity(1, 2, 3, 4, subsystem=5).subsystem_ids == (1, 5)
    device.close()


@pytest.mark.parametrize(("vectors", "size", "pba"), [(1, 4096, 2048), (128, 4096, 2048), (129, 8192, 4096)])
def test_the_msix_bar_has_room_for_all_vectors(vectors: int, size: int, pba: int) -> None:
    bar = MsixBar(1, vectors)
    assert (bar.size_bytes, bar.PBA_OFFSET) == (size, pba)
    with pytest.raises(ConfigError, match="1 to 2048"):
        bar.set_vectors(2049)


def test_an_enlarged_bar_keeps_what_it_has_and_is_empty_beyond() -> None:
    device = ReferenceDevice(memory_bytes=8192)
    for bar in device.bars:
        bar.enlarge(64 << 10)
    with InMemoryClient(device) as again:
        again.region_write(0, 0xF000, b"lost")
        assert again.region_read(0, 0, 4) == b"VFUD"
        assert again.region_read(0, 0xF000, 4) == bytes(4)
        assert again.region_read(2, 0xF000, 4) == b"\xff" * 4
        again.reset()
        assert again.region_read(0, 0, 4) == b"VFUD"
        with pytest.raises(ConfigError, match="at least 65536"):
            again.device.bars[0].enlarge(4096)


SOURCE = """
from vfu_dev.device import Device, Field, Region, Registers
class Mine(Device):
    registers = Registers(0, [Field("a", 0, "<u4", "rw", "", migrates=True)])
class Other: pass
class Broken(Device):
    def __init__(self, name, *, memory_bytes):
        raise KeyError(memory_bytes)
class Missing(Device):
    page = Region(0, size_bytes=4096)
    def initialise(self):
        self.page.store(4096, b"x")
class Nowhere(Device):
    page = Region(0, size_bytes=4096)
    def initialise(self):
        self.guest_memory.write(0, b"x")
"""


def test_a_class_is_found_in_a_file_and_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h12_mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    from_file = find_class("h12_mine.py:Mine")
    assert find_class("h12_mine:Mine") is from_file
    device = make_device(from_file, "n", MigrationFlags.VFIO_MIGRATION_STOP_COPY, {"memory_bytes": 5}, {})
    assert (device.name, device.flags) == ("n", MigrationFlags.VFIO_MIGRATION_STOP_COPY)
    device.close()
    with pytest.raises(ConfigError, match='memory = "1M": Mine decides this itself'):
        make_device(from_file, "n", ALL_FLAGS, {"memory_bytes": 5}, {"memory_bytes": 'memory = "1M"'})
    with pytest.raises(ConfigError, match=r"h12_mine.py:8: KeyError: 5"):
        make_device(find_class("h12_mine:Broken"), "n", ALL_FLAGS, {"memory_bytes": 5}, {})
    with pytest.raises(ConfigError, match=r"h12_mine.py:12: OutsideRegionError: page: 1 bytes at 0x1000"):
        make_device(find_class("h12_mine:Missing"), "n", ALL_FLAGS, {}, {})
    with pytest.raises(ConfigError, match=r"h12_mine.py:16: AccessError: DMA of 1 bytes"):
        make_device(find_class("h12_mine:Nowhere"), "n", ALL_FLAGS, {}, {})


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("Mine", "expected MODULE:CLASS or FILE.py:CLASS"),
        ("nowhere.py:Mine", "there is no file nowhere.py"),
        ("h12_nowhere:Mine", "ModuleNotFoundError"),
        ("bad.py:Mine", r"bad.py:1: SyntaxError"),
        ("ends.py:Mine", r"ends.py:2: SystemExit: 0"),
        ("h12_ends:Mine", r"h12_ends.py:2: SystemExit: 0"),
        ("field.py:Mine", r"device 'field.py:Mine': register mode: access 'r/w': expected one of ro, rw"),
        ("good.py:Yours", "Yours does not exist in good.py; devices there: Mine, Broken, Missing, Nowhere"),
        ("good.py:Other", "Other is not a Device"),
    ],
)
def test_a_class_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, text: str
) -> None:
    (tmp_path / "bad.py").write_text("def\n")
    for name in ("ends.py", "h12_ends.py"):
        (tmp_path / name).write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "field.py").write_text(SOURCE.replace('"rw"', '"r/w"').replace('"a"', '"mode"'))
    (tmp_path / "good.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=text) as caught:
        find_class(spec)
    assert "\n" not in str(caught.value)

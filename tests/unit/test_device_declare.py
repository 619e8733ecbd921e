"""Device classes as their authors write them: what is declared, what each device gets, what is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vfu_dev.cli.loader import find_class, make_device, settled
from vfu_dev.device import NO_BAR, Bar, Device, Field, Msix, PciIdentity, Region, Registers
from vfu_dev.device.reference import ReferenceDevice
from vfu_dev.device.region import OutsideRegionError
from vfu_dev.errors import REFUSALS, ConfigError
from vfu_dev.testing import InMemoryClient, check_device, move


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
        assert isinstance(one.device.bars[0], Registers)
        assert isinstance(Counter.registers, Registers)
        assert not Counter.registers.made
        assert [bar.made for bar in one.device.bars] == [True] * 4
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
    assert device.notes.is_plain
    device.close()
    with pytest.raises(ConfigError, match="notes: a mapped region"):
        Asking()


def test_a_write_reaches_each_register_that_it_touches_in_the_order_of_the_table() -> None:
    """Wherever it begins and ends, and whatever lies between two of them."""
    places = {"third": (24, 4), "first": (0, 8), "gap": (40, 1), "second": (8, 2)}
    heard: list[str] = []

    class Table(Device):
        registers = Registers(
            0, [Field(name, at, f"<u{size}", "rw", "a number") for name, (at, size) in places.items()]
        )

    device = Table()
    for name in places:
        device.registers.on_write(name, lambda _, name=name: heard.append(name))
    with InMemoryClient(device) as client:
        tried = 0
        for begin in range(48):
            for count in range(1, 48 - begin):
                heard.clear()
                client.region_write(0, begin, bytes(count))
                touched = [
                    name for name, (at, size) in places.items() if at < begin + count and begin < at + size
                ]
                assert heard == touched, (begin, count)
                tried += len(touched) > 1
        assert tried > 100


def test_memory_that_somebody_has_a_say_in_is_not_plain() -> None:
    """A server may serve plain memory without calling the device."""

    class OddRegion(Region):
        """Whatever it does."""

    class Odd(Counter):
        notes = OddRegion(2, size_bytes=4096)

    class Reading(Counter):
        def region_read(self, region: Region, offset: int, out: memoryview) -> None:
            """Say in what is read alone."""

    class Counting(Counter):
        def region_handler(self, bar: Bar) -> Callable[[memoryview, int, bool], None]:
            """Say in everything."""
            return super().region_handler(bar)

    for made, notes, cache in (
        (Counter(), True, True),
        (Odd(), False, True),
        (Reading(), False, False),
        (Counting(), False, False),
    ):
        assert (made.notes.is_plain, made.cache.is_plain) == (notes, cache), made.type_name
        made.close()


def test_a_window_begins_where_a_64_bit_register_says() -> None:
    with InMemoryClient(Counter()) as client:
        notes = client.device.notes
        for base in (4096, 3 * 4096, (1 << 64) - 1):
            notes.base_bytes = base
            assert (notes.base_bytes, int(notes.window[0])) == (base, base)
        assert client.region_read(2, 0, 4) == b"\xff" * 4
        for base in (-1, 1 << 64):
            with pytest.raises(OutsideRegionError):
                notes.base_bytes = base
        assert notes.base_bytes == (1 << 64) - 1


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
    with pytest.raises(ConfigError, match=r"Counter: declare late before super\(\).__init__\(\)"):
        device.late = Registers(5, [])  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="Counter: registers is declared, and can be nothing else"):
        device.registers = 5  # type: ignore[assignment]
    device.close()


class Queues(Device):
    """As many queues as whoever makes it says: their registers, memory and interrupts."""

    common = Registers(0, [Field("reset", 0, "<u4", "wo", "of all")])

    def __init__(self, name: str | None = None, *, queues: int = 2, memory_bytes: int = 4096) -> None:
        doorbells = [Field(f"doorbell{n}", 0x10 * n, "<u4", "wo", "rings") for n in range(queues)]
        depths = [
            Field(f"depth{n}", 0x10 * n + 8, "<u4", "rw", "slots", migrates=True) for n in range(queues)
        ]
        self.queues = Registers(1, [*doorbells, *depths], initial={f"depth{n}": 8 for n in range(queues)})
        self.slots = Region(2, size_bytes=memory_bytes)
        self.scratch = Region(NO_BAR, size_bytes=4096)
        self.msix = Msix(4, vectors=queues)
        super().__init__(name)
        for n in range(queues):
            self.queues.on_write(f"doorbell{n}", functools.partial(self.ring, n))

    @common.written("reset")
    def clear(self, _: int) -> None:
        """Have all depths as they were."""
        self.queues.reset()

    def ring(self, queue: int, value: int) -> None:
        """Answer."""
        self.slots.store(queue, bytes([value % 256]))
        self.scratch.store(queue, bytes([self.queues[f"depth{queue}"] % 256]))
        self.raise_irq(queue)


def test_what_depends_on_an_argument_is_declared_in_init() -> None:
    """Beside what the class declares, in the same words; each of its own size, and it migrates."""
    here, there = (Queues(name, queues=5, memory_bytes=3 * 4096) for name in ("here", "there"))
    small = Queues()
    assert [bar.name for bar in here.bars] == ["common", "queues", "slots", "msix"]
    assert [(len(each.queues.fields), each.slots.size_bytes, each.irq_vectors) for each in (here, small)] == [
        (10, 3 * 4096, 5),
        (4, 4096, 2),
    ]
    small.close()
    check_device(Queues)
    with InMemoryClient(here) as one, InMemoryClient(there) as two:
        one.region_write(1, 0x48, b"\x63\0\0\0")
        one.region_write(1, 0x40, b"\x07\0\0\0")
        assert one.irqs == [4]
        move(one, two)
        assert two.region_read(2, 4, 1) == b"\x07"
        assert there.scratch.read(4, 1) == b"\x63"
        assert two.region_read(1, 0x48, 4) == b"\x63\0\0\0"
        two.region_write(0, 0, bytes(4))
        assert two.region_read(1, 0x48, 1) == b"\x08"


def test_a_declaration_is_the_devices_to_make_not_to_use() -> None:
    """What comes too early says what to do."""

    class Early(Device):
        registers = Registers(0, [Field("a", 0, "<u4", "rw", "")])

        def __init__(self) -> None:
            self.registers["a"] = 1

    class Unmade(Device):
        def __init__(self) -> None:
            self.page = Region(0, size_bytes=4096)
            self.page.store(0, b"x")

    class Taken(Device):
        interrupts = Msix(0, vectors=1)

    class Twice(Device):
        first = Registers(0, [])

        def __init__(self) -> None:
            self.second = Region(0, size_bytes=4096)
            super().__init__()

    with pytest.raises(AttributeError, match=r"registers is there once super\(\).__init__\(\) was called"):
        Early()
    with pytest.raises(AttributeError, match=r"Region: a declaration, of which super\(\).__init__\(\) makes"):
        Unmade()
    with pytest.raises(AttributeError, match="registers: a declaration"):
        Counter.registers["sum"]
    with pytest.raises(ConfigError, match="Taken: interrupts is declared, and can be nothing else"):
        Taken()
    with pytest.raises(ConfigError, match="Twice: first and second both need BAR0"):
        Twice()


def test_what_init_declares_counts_before_the_class() -> None:
    class Sized(Counter):
        def __init__(self, *, memory_bytes: int | None = None) -> None:
            if memory_bytes is not None:
                self.notes = Region(2, size_bytes=memory_bytes)
            super().__init__()

    for device, size in ((Sized(), 3 * 4096), (Sized(memory_bytes=8192), 8192)):
        assert [memory.size_bytes for memory in device.memories] == [size] == [device.notes.size_bytes]
        device.close()


def test_one_declaration_serves_many_devices() -> None:
    """It is a value: two devices that were made from it have nothing in common."""
    aux = Region(4, size_bytes=8192)
    one, two = (ReferenceDevice(memory_bytes=4096, more={"aux": aux}) for _ in range(2))
    one.memories[1].store(0, b"x")
    assert not two.memories[1].data.any()
    assert (aux.made, aux.name) == (False, "")
    for device in (one, two):
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
        make_device(Counter, "\r", {}, {})
    for name in ("", "a\tb"):
        with pytest.raises(ConfigError, match="memory: "):
            ReferenceDevice(memory_bytes=4096, more={name: Region(NO_BAR, size_bytes=4096)})


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
    bar = Msix(1, vectors=vectors)
    assert (bar.bar_bytes, bar.pba_offset) == (size, pba)
    for wrong in (0, 2049):
        with pytest.raises(ConfigError, match="1 to 2048"):
            Msix(1, vectors=wrong)


def test_a_larger_bar_is_empty_beyond_what_is_declared() -> None:
    """Whoever serves a device has the last word on its declarations, before anything is made."""
    asked: list[Device] = []

    def larger(device: Device, declared: dict[str, Bar]) -> dict[str, Bar]:
        asked.append(device)
        device.identity = replace(device.identity, vendor=0x1AF4)
        return {name: bar.with_bar(64 << 10) for name, bar in declared.items()}

    cls = settled(ReferenceDevice, larger)
    assert (cls.__name__, cls.type_name) == ("ReferenceDevice", ReferenceDevice.type_name)
    with InMemoryClient(cls(memory_bytes=8192)) as again:
        assert asked == [again.device]
        assert again.device.identity.vendor == 0x1AF4
        assert ReferenceDevice.identity.vendor == 0x4656
        assert {bar.bar_bytes for bar in again.device.bars} == {64 << 10}
        again.region_write(0, 0xF000, b"lost")
        assert again.region_read(0, 0, 4) == b"VFUD"
        assert again.region_read(0, 0xF000, 4) == bytes(4)
        assert again.region_read(2, 0xF000, 4) == b"\xff" * 4
        again.reset()
        assert again.region_read(0, 0, 4) == b"VFUD"
    with pytest.raises(ConfigError, match="at least 4096"):
        ReferenceDevice.registers.with_bar(2048)
    with pytest.raises(ConfigError, match="the size of its file"):
        Region(2, size_bytes=4096, mapped=True).with_bar(8192)


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
class Unforwarding(Device):
    def __init__(self, *, memory_bytes=4096):
        self.page = Region(0, size_bytes=memory_bytes)
        super().__init__()
class Unfinished(Device):
    def __init__(self):
        self.page = Region(0, size_bytes=4096)
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
    device = make_device(from_file, "n", {"memory_bytes": 5}, {})
    assert device.name == device.migration.name == "n"
    device.close()
    device = make_device(find_class("h12_mine:Unforwarding"), "n", {"memory_bytes": 8192}, {})
    assert (device.name, device.migration.name, device.memories[0].size_bytes) == ("n", "n", 8192)
    device.close()
    with pytest.raises(ConfigError, match="device Unfinished: its __init__ has to call super"):
        make_device(find_class("h12_mine:Unfinished"), "n", {}, {})
    with pytest.raises(ConfigError, match='memory = "1M": Mine decides this itself'):
        make_device(from_file, "n", {"memory_bytes": 5}, {"memory_bytes": 'memory = "1M"'})
    with pytest.raises(ConfigError, match=r"h12_mine.py:8: KeyError: 5"):
        make_device(find_class("h12_mine:Broken"), "n", {"memory_bytes": 5}, {})
    with pytest.raises(ConfigError, match=r"h12_mine.py:12: OutsideRegionError: page: 1 bytes at 0x1000"):
        make_device(find_class("h12_mine:Missing"), "n", {}, {})
    with pytest.raises(ConfigError, match=r"h12_mine.py:23: AccessError: DMA of 1 bytes"):
        make_device(find_class("h12_mine:Nowhere"), "n", {}, {})


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("Mine", "expected MODULE:CLASS or FILE.py:CLASS"),
        ("nowhere.py:Mine", "there is no file nowhere.py"),
        ("h12_nowhere:Mine", "there is no module h12_nowhere"),
        ("bad.py:Mine", r"bad.py:1: SyntaxError"),
        ("ends.py:Mine", r"ends.py:2: SystemExit: 0"),
        ("h12_ends:Mine", r"h12_ends.py:2: SystemExit: 0"),
        ("field.py:Mine", r"device 'field.py:Mine': register mode: access 'r/w': expected one of ro, rw"),
        (
            "good.py:Yours",
            "Yours does not exist in good.py; devices there: Mine, Broken, Missing, Unforwarding",
        ),
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

"""The contract of a device, as checks for any device class."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Collection

from vfu_dev.device import Access, Device, Msix, Registers
from vfu_dev.device.bar import judge_place
from vfu_dev.device.fields import layout
from vfu_dev.errors import AccessError, ConfigError, StreamError, VfuDevError
from vfu_dev.migration import ResumeSession, SaveSession
from vfu_dev.migration.fsm import PRE_COPY_GROUP, RUNNING_GROUP
from vfu_dev.testing.memory_client import InMemoryClient, move
from vfu_dev.testing.subject import Found, Subject, attempt, digest, require, visible
from vfu_dev.uapi import DeviceState, MigrationFlags

# Sizes of slices into which transports cut the stream: the result may not depend on them.
_SLICES = (1, 7, 4093, 65536)


class ContractError(VfuDevError, AssertionError):
    """A device breaks the contract.

    Attributes:
        device: the class or factory that was checked.
        broken: name of each failed check -> what it found.
    """

    def __init__(self, device: str, broken: dict[str, str]) -> None:
        lines = [f"{name}: {text}" for name, text in broken.items()]
        super().__init__(f"{device} breaks {len(broken)} of {len(CHECKS)} checks\n" + "\n".join(lines))
        self.device = device
        self.broken = broken


# --- the checks ---------------------------------------------------------------------------------------------


def declarations(subject: Subject) -> None:
    """BARs fit beside each other, registers fit into their BARs, and each register is usable."""
    device = subject.client().device
    for number, bar in enumerate(device.bars):
        try:
            judge_place(device.name, bar, device.bars[:number])
            if isinstance(bar, Registers):
                layout(bar.name, list(bar.fields.values()), bar.bar_bytes)
        except ConfigError as err:
            raise Found(str(err)) from err
        if isinstance(bar, Registers):
            for name, field in bar.fields.items():
                silent = field.access == Access.WRITE_ONLY and name not in bar.hooks
                require(not silent, f"{name} is write-only and has no hook: a write to it does nothing")
                unused = field.default is not None and not field.migrates
                require(not unused, f"{name} has a default for older states, but does not migrate")


def identity(subject: Subject) -> None:
    """Ids fit their fields, and the class says what it is."""
    device = subject.client().device
    who = device.identity
    limits = {"vendor": 16, "device": 16, "class_code": 24, "revision": 8}
    for name, bits in limits.items():
        value = getattr(who, name)
        require(0 <= value < 1 << bits, f"{name} {value:#x} does not fit in {bits} bits")
    require(who.vendor != 0xFFFF, "vendor 0xffff means that there is no device")
    require(bool(device.type_name), "type_name is empty")
    require(sum(isinstance(bar, Msix) for bar in device.bars) <= 1, "more than one MSI-X table")


def bounds(subject: Subject) -> None:
    """Accesses outside of a BAR are refused with EINVAL and change nothing."""
    client = subject.client()
    before = digest(client.device)
    for bar in client.device.bars:
        size = bar.bar_bytes
        for at, count in ((size, 1), (size - 1, 2), (size + 4096, 4), (0, size + 1), (1 << 63, 1), (-1, 1)):
            for access in (
                lambda: client.region_read(bar.index, at, count),  # noqa: B023
                lambda: client.region_write(bar.index, at, b"\xff" * count),  # noqa: B023
            ):
                what = f"BAR{bar.index} ({size} bytes): {count} bytes at {at:#x}"
                try:
                    access()
                except AccessError as err:
                    require(err.errno == errno.EINVAL, f"{what}: refused with errno {err.errno}, not EINVAL")
                except Exception as err:
                    raise Found(f"{what}: {type(err).__name__}, not AccessError: {err}") from err
                else:
                    raise Found(f"{what}: not refused")
    require(digest(client.device) == before, "a refused access changed the state")


def access_sizes(subject: Subject) -> None:
    """Reads and writes of any size, alignment and value are served or refused, never an exception."""
    client = subject.client()
    for bar in client.device.bars:
        sizes = [count for count in (1, 2, 3, 4, 8, 13, 64, bar.bar_bytes // 2) if count <= 1 << 16]
        for count in sizes:
            last = bar.bar_bytes - count
            for at in {0, min(1, last), min(4, last), last // 2 | 1, last}:
                what = f"BAR{bar.index}: reading {count} bytes at {at:#x}"
                attempt(lambda: client.region_read(bar.index, at, count), what)  # noqa: B023
                what = f"BAR{bar.index}: writing {count} bytes at {at:#x}"
                data = subject.random.randbytes(count)
                attempt(lambda: client.region_write(bar.index, at, data), what)  # noqa: B023
    subject.write_registers(client)


def reset(subject: Subject) -> None:
    """A reset returns every register to its initial value, except those declared to survive."""
    for how in (InMemoryClient.reset, InMemoryClient.disconnect):
        client = subject.client()
        registers = [bar for bar in client.device.bars if isinstance(bar, Registers)]
        before = [bar.values.copy() for bar in registers]
        subject.write_registers(client)
        how(client)
        for bar, values in zip(registers, before, strict=True):
            for field in bar.fields.values():
                same = bytes(bar.values[field.name]) == bytes(values[field.name])
                require(
                    same or field.survives_reset,
                    f"after {how.__name__}, {field.name} is {bar.values[field.name][0]}, "
                    f"at first it was {values[field.name][0]}",
                )


def round_trip(subject: Subject) -> None:
    """What a guest sees and what migrates is equal on both sides, however the stream is cut."""
    for slice_bytes in _SLICES:
        source, target = subject.used(), subject.client()
        if slice_bytes == 1:
            _resume_whole(source, target)
            continue
        promised = visible(source)
        move(source, target, slice_bytes)
        found = visible(target)
        lost = [name for name in promised if promised[name] != found[name]]
        lost = [name for name in lost if name not in subject.changed_by_resume]
        require(
            not lost,
            f"in slices of {slice_bytes} bytes, what a guest reads differs in: {', '.join(lost)} (kept "
            "outside of registers that migrate, or stored without marking the page?)",
        )


def _resume_whole(source: InMemoryClient, target: InMemoryClient) -> None:
    """Move a state in tiny slices, without `resumed`: what was packed is what gets unpacked."""
    state = source.device.migration.contents
    save = SaveSession(state, stopped=True)
    session = ResumeSession(target.device.migration.contents)
    buffer = bytearray(1 << 16)
    while stored := save.read_into(memoryview(buffer)):
        step = 1 if stored < len(buffer) // 4 else 61  # a large state byte by byte would take seconds
        for at in range(0, stored, step):
            session.write(memoryview(buffer)[at : min(stored, at + step)])
    session.finish()
    for ours, theirs in zip(state.memories, target.device.migration.contents.memories, strict=True):
        require(bool((ours.data == theirs.data).all()), f"memory {ours.name} differs after a resume")
    for block, other in zip(state.blocks, target.device.migration.contents.blocks, strict=True):
        require(block.pack() == other.pack(), f"registers {block.name}: unpack is not what was packed")


def damaged_stream(subject: Subject) -> None:
    """A stream that is damaged, cut, repeated or foreign is refused, and the device can be used again."""
    source = subject.used()
    source.migration.set_state(DeviceState.STOP_COPY)
    good = source.migration.read_all()
    middle = len(good) // 2
    flipped = bytearray(good)
    flipped[middle] ^= 0x10
    tail = bytearray(good)
    tail[-1] ^= 0x01
    damages = {
        "with a flipped bit": bytes(flipped),
        "with another digest": bytes(tail),
        "cut in the middle": good[:middle],
        "without its last byte": good[:-1],
        "with one byte too many": good + b"\0",
        "with a part repeated": good[:middle] + good[middle - 64 :],
        "of something else": b"something else entirely".ljust(4096, b"."),
        "that is empty": b"",
    }
    for name, stream in damages.items():
        client = subject.client()
        client.migration.set_state(DeviceState.RESUMING)
        try:
            for at in range(0, len(stream), 4093):
                client.migration.write(stream[at : at + 4093])
            client.migration.set_state(DeviceState.RUNNING)
        except StreamError:
            pass
        else:
            raise Found(f"a stream {name} was accepted")
        require(client.migration.get_state() not in RUNNING_GROUP, f"it runs after a stream {name}")
        client.disconnect()
        running = client.migration.get_state() is DeviceState.RUNNING
        require(running, f"after a stream {name} and a reset it is in {client.migration.get_state().name}")
        for memory in client.device.memories:
            clean = memory.written_bytes == 0
            require(clean, f"after a stream {name}, memory {memory.name} keeps unverified content")
        subject.write_memory(client)
        subject.write_registers(client)
        client.migration.set_state(DeviceState.RESUMING)
        client.migration.write(good)
        client.migration.set_state(DeviceState.RUNNING)


def state_policy(subject: Subject) -> None:
    """Running, a device serves everything; stopped, it serves reads, refuses writes (EBUSY), stands still."""
    client = subject.used()
    for state in (DeviceState.STOP, DeviceState.STOP_COPY, DeviceState.STOP, DeviceState.RESUMING):
        client.migration.set_state(state)
        before = digest(client.device)
        for bar in client.device.bars:
            client.region_read(bar.index, 0, min(bar.bar_bytes, 1 << 16))
            try:
                client.region_write(bar.index, 0, b"\xff" * 8)
            except AccessError as err:
                require(err.errno == errno.EBUSY, f"{state.name}: refused with errno {err.errno}, not EBUSY")
            else:
                raise Found(f"BAR{bar.index} takes writes in {state.name}")
        require(digest(client.device) == before, f"its state changes in {state.name}, by a read or a write")
    client.disconnect()
    for state in RUNNING_GROUP:
        if _needed(state) in client.device.flags:
            client.migration.set_state(state)
            for bar in client.device.bars:
                client.region_read(bar.index, 0, 4)
                client.region_write(bar.index, 0, bytes(4))


def _needed(state: DeviceState) -> MigrationFlags:
    """Return the flags without which there is no such state."""
    needed = MigrationFlags(0)
    if state in PRE_COPY_GROUP:
        needed |= MigrationFlags.VFIO_MIGRATION_PRE_COPY
    if state in (DeviceState.RUNNING_P2P, DeviceState.PRE_COPY_P2P):
        needed |= MigrationFlags.VFIO_MIGRATION_P2P
    return needed


def quiet(subject: Subject) -> None:
    """In the P2P states nothing starts: no interrupt, no DMA, whatever is written; it follows afterwards."""
    client = subject.used()
    client.dma_map(0, 1 << 20)
    for state in (DeviceState.RUNNING_P2P, DeviceState.PRE_COPY_P2P):
        if _needed(state) not in client.device.flags:
            continue
        client.migration.set_state(state)
        client.irqs.clear()
        client.bus.accesses.clear()
        subject.write_registers(client)
        subject.write_memory(client)
        client.work()
        raised = f"interrupts {sorted(set(client.irqs))} were raised in {state.name}"
        require(not client.irqs, raised)
        require(not client.bus.accesses, f"guest memory was accessed in {state.name}: see `may_start`")
        client.migration.set_state(DeviceState.RUNNING)


def promised_bytes(subject: Subject) -> None:
    """`initial_bytes`, `dirty_bytes` and the stop-copy length are exactly the bytes that are then read."""
    client = subject.used()
    migration = client.migration
    if MigrationFlags.VFIO_MIGRATION_PRE_COPY in migration.flags():
        migration.set_state(DeviceState.PRE_COPY)
        info = migration.precopy_info()
        require(info.initial_bytes > 0, "initial_bytes is 0 at first, but the stream begins with its schema")
        _check_read(client, info.initial_bytes + info.dirty_bytes, "initial_bytes + dirty_bytes at first")
        info = migration.precopy_info()
        require(info.initial_bytes == 0, f"initial_bytes is {info.initial_bytes} after everything was read")
        subject.write_memory(client)
        subject.write_registers(client)
        info = migration.precopy_info()
        _check_read(client, info.initial_bytes + info.dirty_bytes, "dirty_bytes after writes")
        subject.write_memory(client)
    migration.set_state(DeviceState.STOP_COPY)
    _check_read(client, migration.data_size(), "the stop-copy length")
    require(migration.read(4096) == b"", "there is more after the end of the stream")


def _check_read(client: InMemoryClient, promised: int, what: str) -> None:
    found = len(client.migration.read_all(4093))
    require(found == promised, f"{what} promised {promised} bytes, {found} were read")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    declarations,
    identity,
    bounds,
    access_sizes,
    reset,
    round_trip,
    damaged_stream,
    state_policy,
    quiet,
    promised_bytes,
)


def check_device(factory: Callable[[], Device], *, changed_by_resume: Collection[str] = ()) -> list[str]:
    """Run every check on devices that `factory` makes; each check gets new ones.

    A device that cannot be made, because of an impossible declaration, fails only `declarations`.

    Args:
        factory: the class, or anything that returns a new device; small memories make it quick.
        changed_by_resume: registers that differ after a migration on purpose, such as a count of migrations.

    Returns: the names of the checks.
    Raises: ContractError: with everything that the checks found.
    """
    called = getattr(factory, "__name__", repr(factory))
    try:
        factory().close()
    except ConfigError as err:
        raise ContractError(called, {declarations.__name__: str(err)}) from err
    broken = {}
    for check in CHECKS:
        with Subject(factory, changed_by_resume) as subject:
            try:
                check(subject)
            except Found as found:
                broken[check.__name__] = str(found)
            except Exception as err:
                last = traceback.extract_tb(err.__traceback__)[-1]
                place = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
                broken[check.__name__] = f"{type(err).__name__}: {err} ({place})"
    if broken:
        raise ContractError(called, broken)
    return [check.__name__ for check in CHECKS]

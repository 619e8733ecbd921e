"""Device-private Python state: an author's own pack and unpack, checked and bounded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from vfu_dev.errors import ConfigError, StreamError

_LENGTH_BYTES = 4
MAX_OBJECT_BYTES = (1 << 20) - _LENGTH_BYTES


@dataclass(frozen=True)
class StateObject:
    """State that is neither memory nor registers: a queue of requests, a cipher's key, a parser's position.

    It travels last, in a slot of fixed size: what only STOP_COPY can carry stays constant, whatever the
    object holds at the moment, and a destination knows how much it will be.

    Attributes:
        name: the name under which it migrates.
        pack: returns the present content, at most `max_bytes`. The author chooses the encoding; `pickle` is
            no choice, because the sender of the stream could then run code in the destination.
        unpack: takes over content that was verified and let pass by `validate`; it must not fail.
        validate: raises ValueError or StreamError for content that this device cannot have.
        version: of the encoding, what this program writes.
        accepts: versions it can read; the own one is always among them.
        upgrade: from an older version's content to the present one; called with (content, version).
        default: content to take when the stream comes from a device that had no such object; None refuses.
    """

    name: str
    pack: Callable[[], bytes]
    unpack: Callable[[bytes], None]
    max_bytes: int
    validate: Callable[[bytes], None] = lambda _: None
    version: int = 1
    accepts: Collection[int] = ()
    upgrade: Callable[[bytes, int], bytes] | None = None
    default: bytes | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_bytes <= MAX_OBJECT_BYTES:
            raise ConfigError(f"object {self.name}: {self.max_bytes} bytes, the limit is {MAX_OBJECT_BYTES}")
        if any(version != self.version for version in self.accepts) and self.upgrade is None:
            raise ConfigError(f"object {self.name}: accepts other versions, but cannot upgrade them")
        object.__setattr__(self, "accepts", frozenset({*self.accepts, self.version}))

    @property
    def size_bytes(self) -> int:
        """Size of the slot."""
        return _LENGTH_BYTES + self.max_bytes

    def pack_slot(self) -> bytes:
        """Return the present content in its slot.

        Raises: ConfigError: it is larger than was declared, a defect of the device.
        """
        content = bytes(self.pack())
        if len(content) > self.max_bytes:
            raise ConfigError(f"object {self.name}: {len(content)} bytes, declared were {self.max_bytes}")
        return self._slot(content)

    def _slot(self, content: bytes) -> bytes:
        return (len(content).to_bytes(_LENGTH_BYTES, "little") + content).ljust(self.size_bytes, b"\0")

    def _content(self, slot: bytes) -> bytes:
        length = int.from_bytes(slot[:_LENGTH_BYTES], "little")
        if length > len(slot) - _LENGTH_BYTES or any(slot[_LENGTH_BYTES + length :]):
            raise StreamError(f"object {self.name}: claims {length} bytes of a slot of {len(slot)}")
        return slot[_LENGTH_BYTES : _LENGTH_BYTES + length]

    def validate_slot(self, slot: bytes) -> None:
        """Judge content; raises StreamError."""
        try:
            self.validate(self._content(slot))
        except StreamError:
            raise
        except Exception as err:
            raise StreamError(f"object {self.name}: {err}") from err

    def unpack_slot(self, slot: bytes) -> None:
        """Take over content that was validated."""
        self.unpack(self._content(slot))

    def converter(self, version: int, size_bytes: int) -> Callable[[bytes], bytes]:
        """Return what makes a slot of this version of one of `size_bytes` of another."""

        def convert(slot: bytes) -> bytes:
            content = self._content(slot)
            if version != self.version:
                assert self.upgrade is not None
                try:
                    content = self.upgrade(content, version)
                except Exception as err:
                    raise StreamError(f"object {self.name}: version {version}: {err}") from err
            if len(content) > self.max_bytes:
                raise StreamError(f"object {self.name}: {len(content)} bytes, declared are {self.max_bytes}")
            return self._slot(content)

        return convert

    def missing_content(self) -> bytes | None:
        """Return the slot to take when the stream has none; None when it must have one."""
        return None if self.default is None else self._slot(self.default)

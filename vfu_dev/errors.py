"""The root of everything this package raises, and the one way from an exception to an errno.

    VfuDevError
     ├── ConfigError (ValueError)        an option or file says something impossible
     ├── LibraryError                    libvfio-user is missing, foreign or refused a call
     ├── StateError                      a migration arc or call that the present state does not allow
     ├── AccessError                     an access outside a region, of a bad size, or to stopped state
     ├── StreamError (ValueError)        a state stream that cannot be accepted
     ├── ProtocolError                   a vfio-user peer broke the protocol
     ├── BuildError                      sources or builds: missing, wrong checksum, failed command
     └── LabError                        a move could not be made

Concrete errors live beside the code that raises them; each carries its facts as attributes and, where it can
reach a vfio-user peer, the errno that the peer gets.
"""

from __future__ import annotations

import errno
import json
import unicodedata
from collections.abc import Iterable


class VfuDevError(Exception):
    """Root of the tree. `errno` is what a vfio-user peer gets; EIO unless a subclass knows better."""

    errno: int = errno.EIO


class ConfigError(VfuDevError, ValueError):
    """An option, argument or file asks for something that cannot be."""

    errno = errno.EINVAL


class LibraryError(VfuDevError):
    """libvfio-user is missing, cannot be driven, or refused a call."""

    errno = errno.ENOSYS


class StateError(VfuDevError):
    """The operation is not allowed in the present migration state."""

    errno = errno.EINVAL


class AccessError(VfuDevError):
    """A region access was out of bounds, of an unsupported size, or not allowed now."""

    errno = errno.EINVAL


class StreamError(VfuDevError, ValueError):
    """A migration stream is foreign, damaged, truncated or does not fit this device."""

    errno = errno.EINVAL


class ProtocolError(VfuDevError):
    """The vfio-user peer broke the protocol."""

    errno = errno.EPROTO


class BuildError(VfuDevError):
    """Sources are missing or wrong, or a build command failed."""


class LabError(VfuDevError):
    """A move could not be set up or carried out."""


# What a guest or a client can cause: answered, and logged in one line. All else that a callback raises is a
# defect, of this package or of a device's author, and is logged with its traceback.
REFUSALS = (StateError, AccessError, StreamError)


def errno_of(error: BaseException) -> int:
    """Return the positive errno that a vfio-user peer gets for `error`."""
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number > 0:
        return number
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return errno.EIO


def shown(value: object) -> str:
    """Return `value` for an error message: short, whatever somebody sent."""
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return "(huge)"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def written(value: object) -> str:
    """Return a value that a TOML or JSON file has, for an error message: as JSON, and short."""
    try:
        text = json.dumps(value, default=str)
    except ValueError:  # an integer of more digits than Python prints; TOML has hexadecimal ones
        return "(huge)"
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of `known` that a mistyped `name` probably means; None: it is like none of them."""
    import difflib  # here: no error, no need

    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def judge_name(what: str, name: str) -> None:
    """Find out whether `name` can be the name of `what`, for people and logs.

    Raises: ConfigError: it is empty, or would move the cursor or end a line where it is printed.
    """
    if not name:
        raise ConfigError(f"{what}: a name is missing")
    # Cc: control characters; Zl, Zp: line and paragraph separators (Unicode Standard, section 4.5).
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name):
        raise ConfigError(f"{what}: name {shown(name)}: control characters are not allowed in a name")

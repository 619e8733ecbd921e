"""The version data of VFIO_USER_VERSION: of our proposal, and of a reply."""

from __future__ import annotations

import json
from typing import Any

from vfu_dev.client import messages
from vfu_dev.conformance.model import CheckFailedError, require
from vfu_dev.errors import ProtocolError


def version_request(capabilities: dict[str, Any] | None, major: int = 0, minor: int = 0) -> bytes:
    """Return the payload of a VERSION that proposes `capabilities`; None: without version data."""
    head = messages.VERSION.pack(major, minor)
    if capabilities is None:
        return head
    return head + json.dumps({"capabilities": capabilities}).encode() + b"\0"


def version_capabilities(payload: bytes) -> dict[str, Any]:
    """Return the capabilities of a VERSION reply.

    Raises: CheckFailedError: they are not what the specification describes.
    """
    require(len(payload) >= messages.VERSION.size, f"a VERSION reply of {len(payload)} bytes")
    try:
        return messages.capabilities_of(payload[messages.VERSION.size :])
    except ProtocolError as error:
        raise CheckFailedError(str(error)) from error

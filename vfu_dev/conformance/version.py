"""The version data of VFIO_USER_VERSION: what is proposed, and what a reply names."""

from __future__ import annotations

import json
from typing import Any

from vfu_dev.client import messages
from vfu_dev.conformance.model import CheckFailedError, require


def version_request(capabilities: dict[str, Any] | None, major: int = 0, minor: int = 0) -> bytes:
    """Return the payload of a VERSION that proposes `capabilities`; None: without version data."""
    head = messages.VERSION.pack(major, minor)
    if capabilities is None:
        return head
    return head + json.dumps({"capabilities": capabilities}).encode() + b"\0"


def version_capabilities(payload: bytes) -> dict[str, Any]:
    """Return the capabilities of a VERSION reply.

    Raises:  CheckFailedError: they are not what the specification describes.
    """
    require(len(payload) >= messages.VERSION.size, f"a VERSION reply of {len(payload)} bytes")
    data = payload[messages.VERSION.size :]
    if not data:
        return {}
    require(data.endswith(b"\0"), "version data without its final NUL")
    try:
        value = json.loads(data[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise CheckFailedError(f"version data that is no JSON: {error}") from error
    require(isinstance(value, dict), "version data that is no object")
    capabilities = value.get("capabilities", {})
    require(isinstance(capabilities, dict), "capabilities that are no object")
    return dict(capabilities)

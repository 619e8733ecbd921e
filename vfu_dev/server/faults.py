"""Where faults can stand around a served device: the functions that libvfio-user and the device call."""

from __future__ import annotations

import os
import select
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from vfu_dev.faults import FaultBoard, Wrapped
from vfu_dev.libvfio_user import Context
from vfu_dev.libvfio_user.context import Gate
from vfu_dev.server.served import Served

# How long to sleep between two looks whether a fault is over.
_LOOK_SECONDS = 0.05


def fault_board(
    server: Served, context: Context, hold: Callable[[float | None, Callable[[], bool]], None]
) -> FaultBoard:
    """Return the faults of `server`; none is armed and nothing is wrapped.

    Args:    hold: see `vfu_dev.faults.board.FaultHost`.
    """
    device = server.device

    class ServerHost:
        """What a fault may do to this server."""

        def hold(self, seconds: float | None, over: Callable[[], bool]) -> None:
            hold(seconds, over)

        def disconnect(self) -> None:
            # The library keeps its descriptor, and finds the connection closed with its next call.
            with socket.socket(fileno=os.dup(context.poll_fd)) as connection:
                if server.connected:
                    connection.shutdown(socket.SHUT_RDWR)

        def fail_device(self, reason: str) -> None:
            context.fail_migration()
            device.migration.fail(reason)

    def method(operation: str, name: str) -> Wrapped:
        """Return a method of the server, which looks it up anew for each call."""
        return Wrapped((operation,), getattr(server, name), _attribute(server, name))

    places = [
        method("transition", "arc"),
        method("mig-read", "read_into"),
        method("mig-write", "write"),
        method("reset", "follow_reset"),
        Wrapped(("irq",), device.interrupts.raise_vector, _attribute(device.interrupts, "raise_vector")),
    ]
    if server.library.is_ours:
        places += [method("precopy-info", "precopy_sizes"), method("data-size", "stop_copy_length")]
    if context.dma is not None:
        places.append(
            Wrapped(("dma-read", "dma-write"), device.guest_memory, _attribute(device, "guest_memory"))
        )
    for gate in context.gates:
        accesses = ("region-read", "region-write")
        places.append(Wrapped(accesses, gate.handler, _gate(gate), gate.region))
    return FaultBoard(device, ServerHost(), places)


def _gate(gate: Gate) -> Callable[[Any], None]:
    return lambda replacement: gate.exchange(replacement or gate.handler)


def _attribute(owner: Any, name: str) -> Callable[[Any], None]:
    """Return what replaces `owner`'s attribute or method `name`, and with None brings it back."""
    own = vars(owner).get(name)

    def put(replacement: Any) -> None:
        if replacement is not None:
            setattr(owner, name, replacement)
        elif own is not None:
            setattr(owner, name, own)
        else:
            vars(owner).pop(name, None)

    return put


def wait(
    seconds: float | None,
    over: Callable[[], bool],
    selector: selectors.BaseSelector,
    connection_fd: int,
    turn: Callable[[], bool],
    events: int = 0,
) -> bool:
    """Wait so long (None: without limit), until `over()`, or until the client hangs up; serve the rest.

    Args:
        events: of the client's to wait for as well.
        selector: what is served meanwhile; the connection is not in it.
        turn: other work between two waits; returns whether there is more.

    Returns:  whether it was the client that ended the waiting.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    waiting = select.poll()
    waiting.register(connection_fd, events)  # a hangup is told in any case
    waiting.register(selector.fileno(), select.POLLIN)  # type: ignore[attr-defined]  # an epoll object's
    more = False
    while not over():
        left = _LOOK_SECONDS
        if deadline is not None:
            left = min(left, deadline - time.monotonic())
            if left <= 0:
                return False
        ready = dict(waiting.poll(0 if more else max(1, left * 1000)))
        if connection_fd in ready:
            return True
        for key, _ in selector.select(0):
            key.data()
        more = turn()
    return False

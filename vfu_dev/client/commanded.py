"""A load made by the device itself, started over its control socket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vfu_dev.client.control import ControlClient
from vfu_dev.client.stop import Stop
from vfu_dev.errors import ProtocolError
from vfu_dev.workload import Workload, WorkloadFigures

# Seconds between two `load-status` requests.
POLL_SECONDS = 0.25

LoadReporter = Callable[[WorkloadFigures], None]


def figures_of(status: Any) -> WorkloadFigures:
    """Return the figures in an answer to `load-status`.

    Raises: ProtocolError: it is something else.
    """
    try:
        return WorkloadFigures(**{field.name: status[field.name] for field in fields(WorkloadFigures)})
    except (KeyError, TypeError) as error:
        raise ProtocolError("the server answered load-status with something else") from error


def run_in_device(
    control: ControlClient,
    spec: Workload,
    seconds: float | None,
    stop: Stop,
    reporter: LoadReporter,
    memory: str | None = None,
) -> WorkloadFigures:
    """Have the device behind `control` make the load, and report on it.

    It ends in the server after `seconds`, also when this process is gone by then.

    Raises: ControlError: the server refuses, or is gone.
    """
    arguments = {"memory": memory, "seconds": seconds}
    given = {name: value for name, value in arguments.items() if value is not None}
    status = control.command("load", load=spec.to_dict(), **given)
    try:
        while status["running"] and not stop.wait(POLL_SECONDS):
            status = control.command("load-status")
            reporter(figures_of(status))
    finally:
        if status["running"]:
            status = control.command("load", load=None)
    return figures_of(status)

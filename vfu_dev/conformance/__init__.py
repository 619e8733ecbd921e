"""A conformance suite for any vfio-user server: `vfu-dev check SOCKET`.

`CHECKS` has all checks by name, `choose` selects some, `run` yields a `Result` for each, and `report` formats
them. Nothing here depends on this project's own server.
"""

from vfu_dev.conformance.model import CHECKS, Check, Level, Result, Source, Status
from vfu_dev.conformance.runner import (
    DEFAULT_MAX_STATE_BYTES,
    DEFAULT_TIMEOUT_SECONDS,
    choose,
    run,
    run_in,
)

__all__ = [
    "CHECKS",
    "DEFAULT_MAX_STATE_BYTES",
    "DEFAULT_TIMEOUT_SECONDS",
    "Check",
    "Level",
    "Result",
    "Source",
    "Status",
    "choose",
    "run",
    "run_in",
]

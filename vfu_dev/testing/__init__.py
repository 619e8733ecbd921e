"""Test a device without a VM, a socket or a library: a client in memory, and the contract every device keeps.

    from vfu_dev.testing import check_device

    check_device(Scratchpad)

needs no test framework; it raises `ContractError`, which lists everything that is wrong.
"""

from vfu_dev.exports import publish as _publish
from vfu_dev.testing.bus import InMemoryBus
from vfu_dev.testing.contract import ContractError, check_device
from vfu_dev.testing.memory_client import InMemoryClient, move

__all__ = ["ContractError", "InMemoryBus", "InMemoryClient", "check_device", "move"]

_publish(globals())

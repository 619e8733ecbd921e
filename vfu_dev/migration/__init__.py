"""Migration of a device's state: the state machine, the state stream, and the sessions that send and take it.

Each device has one `Migration`; the other names are its parts, usable and testable alone.
"""

from vfu_dev.migration.audit import StateHasher
from vfu_dev.migration.decoder import StreamDecoder
from vfu_dev.migration.engine import Migration
from vfu_dev.migration.fsm import StateMachine, TransitionError
from vfu_dev.migration.objects import StateObject
from vfu_dev.migration.resume import ResumeSession
from vfu_dev.migration.save import PrecopyInfo, SaveSession
from vfu_dev.migration.schema import MigratableState, RegisterBlock
from vfu_dev.migration.stream import STREAM_VERSION

__all__ = [
    "STREAM_VERSION",
    "MigratableState",
    "Migration",
    "PrecopyInfo",
    "RegisterBlock",
    "ResumeSession",
    "SaveSession",
    "StateHasher",
    "StateMachine",
    "StateObject",
    "StreamDecoder",
    "TransitionError",
]

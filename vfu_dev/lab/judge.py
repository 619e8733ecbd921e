"""Checks the result of a migration, and names what is wrong."""

from __future__ import annotations

from dataclasses import asdict

from vfu_dev.lab.result import MigrationResult
from vfu_dev.sizes import format_count
from vfu_dev.vm.any_server import WITHOUT_CONTROL
from vfu_dev.workload import Workload
from vfu_dev.workload.figures import KEEPS_UP


def judge(
    result: MigrationResult,
    pre_copy: bool | None,
    verified: bool = True,
    load: Workload | None = None,
    digests: bool = True,
    controlled: bool = True,
    cancelled: bool = False,
) -> None:
    """Fill `problems`, `warnings` and `status`.

    Args: pre_copy: whether the device should have moved data in pre-copy; None: either is fine.
          verified: whether a guest should have read everything back. One that found something wrong is a
              problem in any case.
          load: the load asked for, for messages about a rate that was not reached.
          controlled: whether the servers have control sockets; without, only QEMU says what moved.
          digests: whether both servers must have reported a digest; two that differ are always a problem.
          cancelled: whether the migration was cancelled here, which QEMU may call "failed".
    """
    qemu, guest = result.qemu, result.guest
    if qemu.status == "completed":
        _judge_moved(result, pre_copy, verified, digests, controlled)
    else:
        _judge_unmoved(result, cancelled)
    if qemu.downtime_ms is not None and qemu.downtime_ms > qemu.downtime_limit_ms:
        struck = _struck(result)
        why = f"faults that were asked for happened: {struck}" if struck else "is the machine busy?"
        result.warnings.append(
            f"measured downtime {qemu.downtime_ms} ms, limit {qemu.downtime_limit_ms} ms ({why})"
        )
    spec = load or Workload("idle")
    if guest is not None and not _guest_kept_up(result):
        result.warnings.append(f"the guest wrote {spec.reached_text(asdict(guest))}")
    for device, status in zip(result.devices, result.load_status, strict=False):
        if not status.get("keeps_up", True):
            result.warnings.append(f"{device.name} wrote {spec.reached_text(status)}")
    result.warnings += broken_replays(result)
    result.status = "completed" if not result.problems else "failed"


def _struck(result: MigrationResult) -> str:
    """Return the faults that struck, with their hits: `mig-write 1 time at vfu0's destination`."""
    return ", ".join(
        f"{op} {format_count(count, 'time')} at {device.name}'s {side}"
        for device in result.devices
        for side, counts in (("source", device.faults_source), ("destination", device.faults_destination))
        for op, count in counts.items()
    )


def broken_replays(result: MigrationResult) -> list[str]:
    """Return a sentence for each replay that could not keep to its profile."""
    found = []
    for device in result.devices:
        for side, replay in (("source", device.replay_source), ("destination", device.replay_destination)):
            if replay is None or replay["kept"]:
                continue
            why = []
            if replay["late_calls"]:
                calls, late = format_count(replay["calls"], "call"), replay["late_seconds"] * 1e3
                why.append(f"{replay['late_calls']} of {calls} took {late:.0f} ms more in all")
            if replay["overshoot_bytes"]:
                why.append(
                    f"the device's own state needed {format_count(replay['overshoot_bytes'], 'byte')} more"
                )
            found.append(
                f"{device.name}'s {side} did not keep the profile {replay['profile']}: {'; '.join(why)}"
            )
    return found


def profile_kept(result: MigrationResult) -> bool:
    """Return whether every device that replays a profile kept to its sizes and times."""
    return not broken_replays(result)


def load_kept_up(result: MigrationResult) -> bool:
    """Return whether at least 95 % of the load that was asked for was made, by the guest and each device."""
    return _guest_kept_up(result) and all(status.get("keeps_up", True) for status in result.load_status)


def _guest_kept_up(result: MigrationResult) -> bool:
    guest = result.guest
    if guest is None or guest.verified is False:
        return True  # a guest that found an error has no meaningful rate
    return guest.reached_rate_bytes >= KEEPS_UP * guest.asked_rate_bytes


def _judge_unmoved(result: MigrationResult, cancelled: bool) -> None:
    """Say why a migration did not complete, and whether the source goes on as it should."""
    problems, qemu = result.problems, result.qemu
    failed = qemu.status == "failed" and not cancelled
    if qemu.status not in ("cancelled", "none") or not problems:
        says = "calls the migration that was cancelled" if cancelled else "says"
        problems.append(f"QEMU {says} {qemu.status!r}: {qemu.error or 'no reason given'}")
    for device in result.devices:
        for side, session in (("source", device.save), ("destination", device.resume)):
            # Sessions that a cancelled migration aborted say nothing new.
            telling = session and (session.get("status") == "failed" or failed)
            if session and telling and session.get("error"):
                problems.append(f"{device.name}: {side}'s server: {session['error']}")
        if device.state_source not in ("RUNNING", None):
            problems.append(f"{device.name}: source's device is {device.state_source}, not RUNNING")
    if qemu.status != "none" and qemu.run_state_source != "running":
        problems.append(f"the VM on the source is {qemu.run_state_source or 'gone'}, not running")


def _judge_moved(
    result: MigrationResult, pre_copy: bool | None, verified: bool, digests: bool, controlled: bool
) -> None:
    """Find every expectation that a completed migration did not meet."""
    problems, qemu = result.problems, result.qemu
    for device in result.devices:
        name = device.name
        known = device.digest_source is not None and device.digest_destination is not None
        if not device.digest_match and (digests or known):
            problems.append(f"{name}: digests differ: {device.digest_source} and {device.digest_destination}")
        for side, session in (("save", device.save), ("resume", device.resume)):
            if session is None or session.get("status") != "completed":
                found = session and (session.get("error") or session.get("status"))
                problems.append(f"{name}: {side} session did not complete: {found}")
        if device.state_destination != "RUNNING":
            problems.append(f"{name}: destination's device is {device.state_destination}, not RUNNING")
        if device.initial_bytes + device.stop_copy_bytes == 0:
            problems.append(f"{name}: nothing was sent")
        if pre_copy and not (device.initial_bytes and device.precopy_bytes):
            problems.append(f"{name}: pre-copy moved nothing")
        if pre_copy is False and device.precopy_bytes:
            problems.append(f"{name}: {device.precopy_bytes} bytes moved in pre-copy, which is off")
        sent = device.precopy_bytes + device.stop_copy_bytes
        if device.received_bytes != sent:
            problems.append(f"{name}: {sent} bytes sent, {device.received_bytes} received")
    sent = sum(device.precopy_bytes + device.stop_copy_bytes for device in result.devices)
    # In its multifd channels QEMU counts the heads of its packets and its own part of the state as well.
    more_is_right = "multifd" in qemu.capabilities
    # A source that its owner has ended cannot be queried any more.
    says = qemu.vfio_bytes is not None or qemu.run_state_source is not None
    if not controlled:
        result.warnings.append(WITHOUT_CONTROL)
        if not qemu.vfio_bytes:
            problems.append("QEMU moved no device state")
    elif says and qemu.vfio_bytes != sent and not (more_is_right and (qemu.vfio_bytes or 0) > sent):
        problems.append(f"QEMU moved {qemu.vfio_bytes} bytes of device state, the servers sent {sent}")
    guest = result.guest
    if guest is None and not verified:
        return
    if guest is None or (verified and guest.verified is None):
        problems.append(f"guest verification: {guest.error if guest and guest.error else 'not reached'}")
    elif guest.verified is False:
        problems.append(f"guest verification: {guest.problem()}")

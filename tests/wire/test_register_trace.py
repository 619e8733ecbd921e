"""`serve --trace-registers` and `ctl registers`: what a driver did, by name."""

from __future__ import annotations

import pytest
from serverkit import RunningServer, ServerFactory, wait_until
from test_ctl import answer, ctl

from vfu_dev.client import ClientCommandError
from vfu_dev.server.register_trace import MAX_UNKNOWN, SPIN_READS, SPIN_SECONDS
from vfu_dev.uapi import DeviceState

TABLE, STATUS, NOWHERE = 0x80, 0x90, 0xF00


@pytest.fixture
def traced(serve: ServerFactory) -> RunningServer:
    """Return a server that keeps the last 5 accesses."""
    return serve("--trace-registers", "5", memory="64K")


def test_accesses_have_names_values_and_parts(traced: RunningServer) -> None:
    """Whole registers, parts, several at once, none, refused ones; the oldest are forgotten."""
    with traced.connect() as device:
        for _ in range(3):
            device.region_read(0, 0x00, 4)  # forgotten, but for their number
            device.region_write(0, 0x100, bytes(8))
        device.region_write(2, 0, b"memory is not traced")
        device.region_write(0, TABLE, (0x1234000).to_bytes(8, "little"))
        device.region_write(0, TABLE + 4, b"\x01\0\0\0")
        device.region_read(0, STATUS - 8, 16)
        device.region_read(0, NOWHERE, 4)
        device.migration.set_state(DeviceState.STOP)
        with pytest.raises(ClientCommandError):
            device.region_write(0, 0x100, b"12345678")
    found = answer(traced, "registers")
    assert found["accesses_total"] == 11
    told = [(one["write"], one["register"], one["value"], one["count"]) for one in found["accesses"]]
    assert told[:4] == [
        (True, "dma_table", "0x1234000", 1),
        (True, "dma_table[4:8]", "0x1", 1),
        (False, "dma_count, dma_ctrl, dma_status, dma_done", "00" * 16, 1),
        (False, "", "0x0", 1),
    ]
    assert "STOP" in found["accesses"][4]["error"]
    assert {(place["offset"], place["count"]) for place in found["unknown"]} == {(NOWHERE, 1)}
    assert found["spinning"] == []
    text = ctl(traced, "registers", "--last", "3").stdout
    assert "read   BAR0 0xf00 (no register) 0x0" in text
    assert "refused: " in text
    assert "no register: BAR0 0xf00, 4 bytes, read 1 times" in text
    assert "dma_table" not in text
    assert answer(traced, "registers", "--clear")["accesses_total"] == 11
    assert answer(traced, "registers")["accesses"] == []


def test_a_guest_that_spins_is_one_line_in_the_log(traced: RunningServer) -> None:
    """The same read in a row is one access; a register that a guest spins on is named once."""
    with traced.connect() as device:
        reads = 0

        def spins() -> bool:
            nonlocal reads
            for _ in range(2 * SPIN_READS):
                device.region_read(0, STATUS, 4)
            reads += 2 * SPIN_READS
            return bool(answer(traced, "registers")["spinning"])

        # A busy machine may not have them in time at the first attempt.
        wait_until(spins, f"{SPIN_READS} reads within {SPIN_SECONDS:g} s")
        device.region_write(0, 0x100, bytes(8))
        spins()
        device.region_write(0, 0x100, bytes(8))
        for _ in range(10):
            for _ in range(2):
                device.region_read(0, STATUS, 4)
            device.region_write(0, 0x100, bytes(8))
        device.region_write(0, 0x100, bytes(8))  # the same write twice is two writes
    found = answer(traced, "registers")
    assert found["spinning"] == ["dma_status"]
    assert found["accesses_total"] == reads + 33
    assert [one["count"] for one in found["accesses"]] == [2, 1, 2, 1, 1]
    log = traced.log()
    assert log.count("the guest spins on dma_status of BAR0") == 1


def test_a_hostile_guest_fills_no_memory(traced: RunningServer) -> None:
    """Places that are no register are told apart up to a number."""
    with traced.connect() as device:
        for offset in range(2048, 4090):
            device.region_read(0, offset, 1)
    found = answer(traced, "registers", "--last", "0")
    assert found["accesses"] == []
    assert found["accesses_total"] == 2042
    assert len(found["unknown"]) <= MAX_UNKNOWN


def test_without_the_option_there_is_no_trace(serve: ServerFactory) -> None:
    """The command says what to do; what cannot be asked is refused."""
    server = serve(memory="64K")
    done = ctl(server, "registers")
    assert done.returncode == 1
    assert "not traced; start the server with --trace-registers" in done.stderr
    sent = ctl(server, "send", '{"command": "registers", "last": "all"}')
    assert sent.returncode == 1
    assert "expected a number of accesses" in sent.stderr

"""Scrapes a metrics port ten times a second until its standard input ends; a process of its own.

With a control socket it also sends each command that only reads figures, at the same rate.
"""

from __future__ import annotations

import http.client
import select
import sys
import time
from contextlib import ExitStack

from vfu_dev.client.control import ControlClient

INTERVAL_SECONDS = 0.1
STATUS_COMMANDS = ("status", "figures", "faults", "load-status")


def main() -> None:
    """Scrape the port and poll the control socket of the command line; print the counts at the end."""
    port, *controls = sys.argv[1:]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
    count, due = 0, time.monotonic()
    with ExitStack() as stack:
        clients = [stack.enter_context(ControlClient(path)) for path in controls]
        while True:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            answer.read()
            for client in clients:
                for command in STATUS_COMMANDS:
                    client.command(command)
            count += answer.status == 200
            if count == 1:
                print("scraping", flush=True)
            due = max(due + INTERVAL_SECONDS, time.monotonic())
            if select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
                break
    print(count, flush=True)


if __name__ == "__main__":
    main()

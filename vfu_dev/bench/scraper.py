"""Scrapes a metrics port ten times a second until its standard input ends; a process of its own."""

from __future__ import annotations

import http.client
import select
import sys
import time

INTERVAL_SECONDS = 0.1


def main() -> None:
    """Scrape the port that the command line names; print how often at the end."""
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
    count, due = 0, time.monotonic()
    while True:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        answer.read()
        count += answer.status == 200
        if count == 1:
            print("scraping", flush=True)
        due = max(due + INTERVAL_SECONDS, time.monotonic())
        if select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
            break
    print(count, flush=True)


if __name__ == "__main__":
    main()

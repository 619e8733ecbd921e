"""The exporter's process: `python -m vfu_dev.metrics.exporter FEED_FD LISTEN_FD PID`, started by `launch`."""

from __future__ import annotations

import logging
import signal
import socket
import sys

from prometheus_client import ProcessCollector

from vfu_dev.metrics.collector import device_registry
from vfu_dev.metrics.source import FigureSource
from vfu_dev.metrics.web import WebServer


def main(arguments: list[str]) -> None:
    """Serve until the server hangs up."""
    feed_fd, listen_fd, pid = map(int, arguments)
    # Ctrl-C reaches every process of the terminal; this one ends when the server does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s metrics: %(message)s")
    source = FigureSource(socket.socket(fileno=feed_fd))
    registry = device_registry(source.snapshot)
    ProcessCollector(pid=lambda: pid, registry=registry)  # of the server, not of this process
    WebServer(socket.socket(fileno=listen_fd), source, registry).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])

"""HTTP: `/metrics` for Prometheus, a live page for people, `/api/status` for that page, `/healthz`."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from vfu_dev.figures import verdict
from vfu_dev.metrics.source import FigureSource, FigureSourceError

logger = logging.getLogger(__name__)

# A client that sends or reads nothing for this time is dropped.
_CLIENT_TIMEOUT_SECONDS = 10.0
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The page is one file that talks only to its own server.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


_METHODS = ("GET", "HEAD")


def _is_address_or_localhost(host: str) -> bool:
    """Return whether a Host header (NAME, NAME:PORT or [ADDRESS]:PORT) names an address or localhost."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in ("", "localhost"):  # HTTP/1.0 names no host; nor does a browser send such a request
        return True
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


class WebServer(ThreadingHTTPServer):
    """Serves on a socket that listens already, until the server behind `source` ends.

    Args:
        listener: bound and listening; owned by this object.
        source: where figures come from.
        registry: what `/metrics` shows.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, source: FigureSource, registry: CollectorRegistry) -> None:
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.source = source
        self.registry = registry
        self.is_local = ip_address(listener.getsockname()[0]).is_loopback
        self.page = resources.files("vfu_dev.metrics").joinpath("page.html").read_bytes()

    def service_actions(self) -> None:
        """End with the server whose figures these are; the loop of socketserver calls this twice a second."""
        if self.source.hung_up():
            raise SystemExit(0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a client did to us in one line; a broken pipe is its own business."""
        logger.debug("a client of the metrics port went away", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One HTTP client."""

    server: WebServer
    protocol_version = "HTTP/1.1"
    timeout = _CLIENT_TIMEOUT_SECONDS
    server_version = "vfu-dev"
    sys_version = ""

    def parse_request(self) -> bool:
        """Read the request; a method that is none of ours is 405 here and 501 in the base class."""
        if not super().parse_request():
            return False
        if self.command not in _METHODS:
            self._answer_405()
            return False
        if not self._may_name(self.headers.get("Host", "")):
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this port answers to localhost and to addresses")
            return False
        return True

    def _answer_405(self) -> None:
        self.close_connection = True  # what comes with the request is not read
        self._answer(
            "text/plain; charset=utf-8",
            b"there are GET and HEAD\n",
            HTTPStatus.METHOD_NOT_ALLOWED,
            {"Allow": ", ".join(_METHODS)},
        )

    def _may_name(self, host: str) -> bool:
        """Return whether a request for `host` may be meant for us.

        A page in the browser of somebody on this machine can have its own host name resolve to 127.0.0.1 and
        so read what is served for localhost alone ("DNS rebinding"); the name in the request gives it away.
        Where the port is open to the network, names are whatever the network calls us.
        """
        return not self.server.is_local or _is_address_or_localhost(host)

    def do_GET(self) -> None:
        """Answer GET."""
        url = urlsplit(self.path)
        try:
            match url.path:
                case "/metrics":
                    self._metrics()
                case "/api/status":
                    self._status(url.query)
                case "/":
                    self._answer("text/html; charset=utf-8", self.server.page)
                case "/healthz":
                    self.server.source.check()
                    self._answer("text/plain; charset=utf-8", b"ok\n")
                case _:
                    self._refuse(HTTPStatus.NOT_FOUND, "there are /, /metrics, /api/status and /healthz")
        except FigureSourceError as err:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(err))

    def do_HEAD(self) -> None:
        """Answer HEAD: the same without the body."""
        self.do_GET()

    def _metrics(self) -> None:
        encoder, content_type = choose_encoder(self.headers.get("Accept", ""))
        self._answer(content_type, encoder(self.server.registry))

    def _status(self, query: str) -> None:
        text = parse_qs(query).get("after", ["0"])[-1]
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            self._refuse(HTTPStatus.BAD_REQUEST, "after: expected the number of a sample")
            return
        figures = self.server.source.figures(int(text))
        answer = figures.as_dict() | {"verdict": verdict(figures.snapshot)}
        self._answer("application/json", json.dumps(answer).encode())

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._answer("text/plain; charset=utf-8", reason.encode() + b"\n", status)

    def _answer(
        self,
        content_type: str,
        body: bytes,
        status: HTTPStatus = HTTPStatus.OK,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.send_response(status)
        for name, value in (_HEADERS | dict(headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the access log for debugging; ten scrapes a second are no news."""
        logger.debug("%s: " + format, self.address_string(), *args)

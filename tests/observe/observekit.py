"""What tests of the metrics port, the live page and `top` share."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serverkit import RunningServer

Browser = Callable[..., str]


@dataclass
class Web:
    """A server's metrics port."""

    port: int

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", method=method, headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def status(self, after: int = 0) -> dict[str, Any]:
        """Return what the live page is fed with."""
        return json.loads(self.get(f"/api/status?after={after}")[2])

    def answers(self) -> bool:
        """Say whether it is up."""
        try:
            return self.get("/healthz")[0] == 200
        except OSError:
            return False


@dataclass
class Pair:
    """A source that is full of data, and an empty destination, each with a metrics port."""

    source: RunningServer
    destination: RunningServer
    web: Web
    other_web: Web

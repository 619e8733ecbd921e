"""What tests of the metrics port, the live page and `top` share."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serverkit import PATIENCE_SECONDS, RunningServer

Browser = Callable[..., str]

PICTURES = Path(__file__).parents[2] / "docs" / "img"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PHONE_WIDTH = 390
# What the documents show, and what nobody has to look at in vain: dark, and as wide as a phone. The end of a
# picture's name -> options of the browser.
_DESK = "--window-size=1180,910"
LOOKS = {
    "": (_DESK,),
    "-dark": (_DESK, "--blink-settings=preferredColorScheme=0"),
    "-phone": (f"--window-size={PHONE_WIDTH},1580",),
}


def take_picture(address: str, browse: Browser, folder: Path, name: str, *options: str) -> None:
    """Check a screenshot; VFU_DEV_UPDATE_PICTURES=1 puts it into docs/img."""
    picture = (PICTURES if os.environ.get("VFU_DEV_UPDATE_PICTURES") else folder) / name
    browse(address, f"--screenshot={picture}", *options)
    assert picture.read_bytes().startswith(PNG_MAGIC)
    assert picture.stat().st_size > 20_000  # an empty page is smaller
    assert (PICTURES / name).exists()


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
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
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

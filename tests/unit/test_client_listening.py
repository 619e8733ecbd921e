"""Whether somebody listens on a UNIX socket is known without connecting to it."""

from __future__ import annotations

import socket
from pathlib import Path

from vfu_dev.client.listening import is_listening


def test_a_socket_listens_from_listen_on(short_tmp: Path) -> None:
    """Not while there is no file, not when it is only bound, not when its owner is gone."""
    path = short_tmp / "a.sock"
    assert not is_listening(path)
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(path))
        assert path.exists()
        assert not is_listening(path)
        owner.listen()
        assert is_listening(path)
        assert not is_listening(short_tmp / "b.sock")
    assert path.exists()
    assert not is_listening(path)

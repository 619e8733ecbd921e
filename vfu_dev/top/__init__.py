"""`vfu-dev top`: the figures of one or more servers in a terminal."""

from vfu_dev.top.terminal import Keys
from vfu_dev.top.view import render
from vfu_dev.top.watched import Watched, refresh_all

__all__ = ["Keys", "Watched", "refresh_all", "render"]

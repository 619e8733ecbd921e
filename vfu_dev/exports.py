"""Where what is public says that it is."""

from __future__ import annotations

from typing import Any


def publish(namespace: dict[str, Any]) -> None:
    """Have each name in `__all__` of a package show the path that it is imported from.

    `vfu_dev.client.Migrator` may move within `vfu_dev.client` then: error messages, tracebacks and `help()`
    name the public path alone.

    Args: namespace: the package's `globals()`, once all is imported.
    """
    for name in namespace["__all__"]:
        if isinstance(namespace[name], type) or callable(namespace[name]):
            namespace[name].__module__ = namespace["__name__"]

"""An environment that has nothing but the wheel."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Installed:
    """vfu-dev from a wheel, in a virtual environment of its own.

    Attributes:
        folder: of the environment.
        environment: without a compiler in the PATH, and with a cache that is empty.
        cache: that cache's folder.
    """

    folder: Path
    environment: dict[str, str]
    cache: Path

    @property
    def program(self) -> Path:
        """The command."""
        return self.folder / "bin" / "vfu-dev"

    def run(self, *words: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
        """Run `vfu-dev WORDS` to its end."""
        settings = {"env": self.environment, "cwd": self.folder, "capture_output": True, "text": True, **more}
        return subprocess.run([self.program, *words], **settings)  # type: ignore[call-overload, no-any-return]

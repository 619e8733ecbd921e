"""The profiles that come with vfu-dev, by name."""

from __future__ import annotations

from pathlib import Path

from vfu_dev.errors import ConfigError

# Files of the package.
FOLDER = Path(__file__).resolve().parents[1] / "profiles"


def shipped() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def profile_path(text: str) -> Path:
    """Return the file of a profile: a path, or the name of a shipped one.

    Raises: ConfigError: there is neither.
    """
    path = Path(text)
    if text in shipped() and not path.exists():
        return FOLDER / f"{text}.toml"
    if not path.is_file():
        raise ConfigError(f"profile {text}: no such file, and no shipped profile: {', '.join(shipped())}")
    return path.resolve()


def serve_arguments(text: str, scale: int) -> tuple[str, ...]:
    """Return the arguments with which `serve` replays a profile. Raises: as `profile_path`."""
    return ("--profile", str(profile_path(text)), "--scale", str(scale))

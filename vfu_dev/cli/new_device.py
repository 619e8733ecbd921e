"""`vfu-dev new-device`: write a device class to start from."""

from __future__ import annotations

import re
from pathlib import Path

import click

from vfu_dev.cli.output import json_option, write_json
from vfu_dev.cli.params import option
from vfu_dev.cli.shape import TO_STDOUT, Command
from vfu_dev.errors import ConfigError

TEMPLATES = Path(__file__).parent / "templates"


@click.command(
    cls=Command,
    examples=["vfu-dev new-device my_device.py", "vfu-dev new-device devices/ring_nic.py --class RingNic"],
)
@click.argument("path", type=click.Path(path_type=Path))
@option("--class", "name", metavar="NAME", help="Name of the class.  [default: the file's, as MyDevice]")
@option("--force", is_flag=True, help="Write over files that are there.")
@json_option("Also write the names of both as JSON", any_word=False)
def command(path: Path, name: str | None, force: bool, json_path: str | None) -> None:
    """Write a small, complete device class to PATH, and its test beside it.

    The device has registers, a memory in a BAR and an interrupt, and migrates with pre-copy. It passes
    `vfu-dev check-device`; `vfu-dev docs authors` explains each part.
    """
    path = path if path.suffix else path.with_suffix(".py")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ConfigError(f"{path}: expected the name of a Python module: my_device.py")
    name = name or "".join(word[:1].upper() + word[1:] for word in path.stem.split("_"))
    if not name.isidentifier():
        raise ConfigError(f"--class {name}: expected the name of a Python class: MyDevice")
    test = path.with_name(f"test_{path.name}")
    there = [str(one) for one in (path, test) if one.exists()]
    if there and not force:
        raise ConfigError(f"{' and '.join(there)}: there already; choose another name, or --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, template in ((path, "device.py.txt"), (test, "test_device.py.txt")):
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        text = re.sub(r"\bDEVICE\b", name, text)
        file.write_text(re.sub(r"\bMODULE\b", path.stem, text), encoding="utf-8")
    spec = f"{path}:{name}"
    write_json({"kind": "new-device", "device": spec, "test": str(test)}, json_path)
    if json_path != TO_STDOUT:
        click.echo(f"wrote {path} and {test}. What next:")
        click.echo(f"  vfu-dev check-device {spec}")
        click.echo(f"  pytest {test}")
        click.echo(f"  vfu-dev lab migrate --device {spec} --guest none")

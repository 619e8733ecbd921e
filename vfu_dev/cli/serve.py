"""`vfu-dev serve`: serve a device until a signal or `quit` ends it."""

from __future__ import annotations

import gc
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vfu_dev.cli.configfile import as_toml, blaming, config_options, given, origin
from vfu_dev.cli.identity import decided, identity_options, settle
from vfu_dev.cli.load_options import load_of, load_options
from vfu_dev.cli.params import LEVEL, ON_OFF, SIZE, NumberType
from vfu_dev.cli.profile_options import checked, profile_options
from vfu_dev.cli.shape import Command
from vfu_dev.cli.socket_options import socket_options, sockets_of
from vfu_dev.errors import ConfigError, judge_name
from vfu_dev.logs import set_up_logging
from vfu_dev.migration.fsm import ALL_FLAGS
from vfu_dev.server.register_trace import DEFAULT_ACCESSES, MAX_ACCESSES
from vfu_dev.sizes import parse_size
from vfu_dev.uapi import MigrationFlags

if TYPE_CHECKING:
    from vfu_dev.device import Bar, Device, Region
    from vfu_dev.metrics.launch import Exporter

logger = logging.getLogger(__name__)

MIN_PAGE_SIZE_BYTES = 4096
DEFAULT_MEMORY = "256M"


def _memory_texts(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what is no size; the rest is judged by `_parse_memories`."""
    for text in value:
        try:
            parse_size(text.split(",")[0].partition("=")[2] or text)
        except ValueError as err:
            raise click.BadParameter(str(err), ctx, param) from err
    return value


def _faults(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what is no fault; raises ConfigError."""
    from vfu_dev.faults import Fault

    for text in value:
        Fault.parse(text)
    return value


@click.command(
    cls=Command,
    examples=[
        "vfu-dev serve --socket /tmp/vfu.sock --memory 64M --fill 1",
        "vfu-dev serve --socket /tmp/vfu.sock --memory 64M --dirty-rate 2000p --metrics-port 9470",
        "vfu-dev serve --socket /tmp/vfu.sock --memory 64K --profile mlx5-300mb --scale 20",
        "vfu-dev serve --socket /tmp/vfu.sock --memory 64M --fill 1 --data-window off",
        "vfu-dev serve --device docs/examples/kvstore.py:KeyValueStore --socket /tmp/kv.sock",
    ],
    context_settings={"show_default": True},
)
@config_options
@socket_options
@click.option(
    "--device",
    "device_spec",
    metavar="MODULE:CLASS|FILE.py:CLASS",
    help="Serve this device class of yours (vfu-dev docs authors).",
    show_default="the reference device",
)
@click.option(
    "--memory",
    "memories",
    multiple=True,
    callback=_memory_texts,
    metavar="SIZE|NAME=SIZE[,KEY=VALUE...]",
    help="SIZE: device memory behind BAR2. NAME=SIZE: one more memory, repeatable; keys are bar=4 (else it "
    "has none), window=SIZE (show that much of it in the BAR), access=trap|mmap, page-size=SIZE.",
    show_default="256M",
)
@click.option(
    "--page-size",
    default="4K",
    type=SIZE,
    help="Unit of dirty tracking, a power of two.",
)
@click.option(
    "--access",
    default="trap",
    type=click.Choice(["trap", "mmap"]),
    help="How the guest reaches the memory behind BAR2: trap sends every access here, "
    "mmap lets the guest write to it directly; a migration then scans the memory for "
    "changes.",
)
@click.option(
    "--initial",
    default=None,
    type=SIZE,
    help="Bytes of written memory, from the lowest address, that a migration counts as initial data.",
    show_default="all that was ever written",
)
@click.option(
    "--fill",
    default=0,
    type=NumberType(),
    metavar="NUMBER",
    help="Seed of the memory's initial content; 0 leaves the memory untouched.",
)
@click.option("--name", default="vfu-dev", help="Name of the device in logs and status.")
@click.option("--pre-copy", default="on", type=ON_OFF, help="Announce the PRE_COPY states.")
@click.option(
    "--data-window",
    default="on",
    type=ON_OFF,
    help="Let a client have migration data in memory that it shares, instead of in messages.",
)
@load_options()
@click.option(
    "--fault",
    "faults",
    multiple=True,
    callback=_faults,
    metavar="KEY=VALUE[,...]",
    help="Arm a fault, repeatable (vfu-dev docs faults): op=OPERATION, an action such as "
    "error=EIO, delay=1.5, corrupt, truncate=1M, disconnect, and when: rate=10%, count=1, after=3, "
    "trigger=FILE, state=STOP_COPY. Example: op=mig-write,delay=1.5,when=initial-received",
)
@profile_options
@click.option(
    "--trace-registers",
    "traced",
    default=0,
    type=NumberType(0, MAX_ACCESSES),
    is_flag=False,
    flag_value=DEFAULT_ACCESSES,
    metavar="[COUNT]",
    help=f"Keep the last accesses to registers by name, {DEFAULT_ACCESSES} or COUNT, and what a driver "
    "touches that is no register, for `vfu-dev ctl SOCKET registers`; warn of a guest that spins on one. "
    "0: no trace.",
)
@click.option(
    "--metrics-port",
    default=0,
    type=NumberType(0, 65535),
    help="HTTP port of the metrics and the live page; 0: no port.",
)
@click.option("--metrics-addr", default="127.0.0.1", help="Address that port listens on.")
@click.option(
    "--log-format",
    default="human",
    type=click.Choice(["human", "json"]),
    help="Lines for people, or JSON objects with the same figures as fields.",
)
@click.option(
    "--log-level",
    default="info",
    type=LEVEL,
    help="Lowest level of the lines on standard error.",
)
@click.option(
    "--library",
    "library_path",
    default=None,
    type=click.Path(path_type=Path),
    help="libvfio-user to use.",
    show_default="$VFU_DEV_LIBVFIO_USER, else what `vfu-dev build` built",
)
@identity_options
def command(
    print_config: bool,
    sockets: dict[str, Any],
    device_spec: str | None,
    memories: tuple[str, ...],
    page_size: int,
    access: str,
    initial: int | None,
    fill: int,
    name: str,
    pre_copy: str,
    data_window: str,
    load_arguments: dict[str, Any],
    faults: tuple[str, ...],
    profile: str | None,
    scale: int,
    traced: int,
    metrics_port: int,
    metrics_addr: str,
    log_format: str,
    log_level: str,
    library_path: Path | None,
    **identity: Any,
) -> None:
    """Serve the device on a vfio-user socket until SIGTERM, SIGINT or the control socket's quit.

    Logs one line per state change to standard error; prints one line to standard output once clients can
    connect. With the options of a load the device writes to its first memory from the start, as after
    `vfu-dev ctl SOCKET load`.
    """
    # Imported here: `--help` need not pay for numpy.
    from vfu_dev import libvfio_user
    from vfu_dev.cli.loader import find_class, keywords, make_device, settled
    from vfu_dev.device.reference import ReferenceDevice
    from vfu_dev.faults import Fault
    from vfu_dev.server import Server
    from vfu_dev.server.register_trace import RegisterTrace

    ctx = click.get_current_context()
    where = None if print_config else sockets_of(sockets)
    log_limit = set_up_logging(log_format, log_level)
    _allow_files()
    flags = ALL_FLAGS
    if pre_copy == "off":
        flags &= ~MigrationFlags.VFIO_MIGRATION_PRE_COPY
    with blaming(ctx, _DEVICE_OPTIONS, identity):
        if page_size < MIN_PAGE_SIZE_BYTES:
            raise ConfigError(f"--page-size {page_size}: at least {MIN_PAGE_SIZE_BYTES}")
        memory, more = _parse_memories(memories, page_size)
        options: dict[str, Any] = {
            "memory_bytes": memory,
            "page_size_bytes": page_size,
            "mapped": access == "mmap",
            "more": more,
            "fill_seed": fill,
        }

        def decide(device: Device, declared: dict[str, Bar]) -> dict[str, Bar]:
            device.flags &= flags
            if initial is not None:
                device.initial_limit_bytes = initial
            return settle(identity, device, declared)

        if device_spec is None:
            device: Device = settled(ReferenceDevice, decide)(name, **options)
        else:
            chosen = _chosen(ctx)
            if more:
                chosen["more"] = f"{origin(ctx, 'memories')} NAME=SIZE"
            device = make_device(settled(find_class(device_spec), decide), name, options, chosen)
    try:
        if where is None:
            takes = keywords(type(device))
            without = [option for option, keyword in _DEVICE_OPTIONS.items() if keyword not in takes]
            values = decided(device) | {"initial": device.initial_limit_bytes}
            click.echo(as_toml(ctx, values, without), nl=False)
            return
        with blaming(ctx, load_arguments):
            load = load_of(load_arguments)
        library = libvfio_user.open_library(find_library(library_path))
        replay = None
        if (path := checked(profile, scale)) is not None:
            from vfu_dev.profile import read_profile
            from vfu_dev.replay.replay import Replay

            replay = Replay(device, read_profile(path), scale)
        with _exporter(metrics_addr, metrics_port) as exporter:
            trace = RegisterTrace(name, traced) if traced else None
            server = Server(
                device,
                library,
                where.client,
                where.control,
                trace,
                access=where.access,
                must_migrate=where.must_migrate,
                data_window=data_window == "on",
                replay=replay,
            )
            try:
                server.log_limit = log_limit
                if load is not None:
                    server.load.start(load)
                for fault in faults:
                    server.faults.arm(Fault.parse(fault))
                if exporter is not None:
                    server.feed(exporter.feed)
                    logger.info("%s: metrics and live page on %s", name, exporter.url)

                def ready() -> None:
                    gc.enable()  # see _COLLECT_LATER in vfu_dev.cli
                    click.echo(f"serving {name} on {where}")

                server.run(on_ready=ready)
            finally:
                server.close()
                log_limit.advance(at_once=True)
    finally:
        device.close()


def _allow_files() -> None:
    """Use as many file descriptors as the system allows: a client may set up 2048 interrupts, one each.

    The usual limit of 1024 is there for programs that call select(), which cannot count further.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # a sandbox may forbid it, and most clients need few
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# Options that a device takes or not -> its keyword.
_DEVICE_OPTIONS = {
    "memories": "memory_bytes",
    "page_size": "page_size_bytes",
    "access": "mapped",
    "fill": "fill_seed",
}


def _chosen(ctx: click.Context) -> dict[str, str]:
    """Return keyword -> where it was set, of the device's options that the user set."""
    return {_DEVICE_OPTIONS[name]: origin(ctx, name) for name in given(ctx) if name in _DEVICE_OPTIONS}


@contextmanager
def _exporter(address: str, port: int) -> Iterator[Exporter | None]:
    """Have metrics and live page served while the context lasts; port 0 means none."""
    if not port:
        yield None
        return
    from vfu_dev.metrics.launch import Exporter

    exporter = Exporter(address, port)
    try:
        yield exporter
    finally:
        exporter.close()


def find_library(option: Path | None) -> Path:
    """Return the libvfio-user to load: the option, the environment, or what was built.

    Raises: BuildError: there is none; the text says what to run.
    """
    if option is not None:
        return option
    named = os.environ.get("VFU_DEV_LIBVFIO_USER")
    if named:
        return Path(named)
    from vfu_dev.builds import artifact

    return artifact("libvfio-user")


def _parse_memories(options: tuple[str, ...], page_size: int) -> tuple[int, dict[str, Region]]:
    """Return the size behind BAR2 and the further memories that the --memory options ask for."""
    from vfu_dev.device import NO_BAR, Region

    sizes = [text for text in options if "=" not in text.split(",")[0]]
    if len(sizes) > 1:
        raise ConfigError(f"--memory {' and '.join(sizes)}: further memories need a name, NAME=SIZE")
    more: dict[str, Region] = {}
    for text in options:
        if text in sizes:
            continue
        first, *rest = text.split(",")
        name, _, size = first.partition("=")
        pairs = dict(part.partition("=")[::2] for part in rest)
        unknown = sorted(set(pairs) - {"bar", "window", "access", "page-size"})
        if unknown or pairs.get("access", "trap") not in ("trap", "mmap"):
            raise ConfigError(f"--memory {text}: expected bar=, window=, access=trap|mmap, page-size=")
        if name in more:
            raise ConfigError(f"--memory {text}: two memories with the name {name}")
        try:
            judge_name("memory", name)
            more[name] = Region(
                int(pairs["bar"]) if "bar" in pairs else NO_BAR,
                size_bytes=parse_size(size),
                page_size_bytes=parse_size(pairs["page-size"]) if "page-size" in pairs else page_size,
                mapped=pairs.get("access") == "mmap",
                bar_bytes=parse_size(pairs["window"]) if "window" in pairs else None,
            )
        except ValueError as err:
            raise ConfigError(f"--memory {text}: {err}") from err
    try:
        return parse_size(sizes[0] if sizes else DEFAULT_MEMORY), more
    except ValueError as err:
        raise ConfigError(f"--memory: {err}") from err

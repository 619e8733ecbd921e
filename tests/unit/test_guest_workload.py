"""The guest's load patterns, in C, against those in Python: the same writes at the same moments."""

from __future__ import annotations

import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest

from vfu_dev.builds.native import native_dir
from vfu_dev.errors import ConfigError
from vfu_dev.vm.guest_program import program_lines
from vfu_dev.workload import Burst, Phase, Program, Workload, contents

KIB, MIB = 1 << 10, 1 << 20
SECOND = 1_000_000_000

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vfud-load as the guest's image has it, but built for this machine."""
    path = tmp_path_factory.mktemp("guest") / "vfud-load"
    sources = sorted((native_dir() / "guest" / "vfud-load").glob("*.c"))
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined,address"]
    subprocess.run(["cc", *flags, "-o", path, *sources, "-lm"], check=True)
    return path


def dump(
    program: Path, spec: Workload, memory: int, page: int, asked: list[str], device: int = 0
) -> list[str]:
    """Return what the C program answers to `asked` with the load `spec`."""
    lines = [line for line in program_lines(spec, page) if line != "clear"]
    done = subprocess.run(
        [program, "--dump", str(memory), str(page), str(device)],
        input="\n".join([*lines, *asked, ""]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def dumped(program: Path, lines: list[str], page: int) -> subprocess.CompletedProcess[str]:
    """Run the C program on `lines` for a memory of 1 MiB."""
    return subprocess.run(
        [program, "--dump", str(MIB), str(page), "0"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )


def recording(path: Path) -> str:
    path.write_text("time,offset,length\n0,0,8\n0.25,4096,100\n0.25,65535,1\n0.5,8192,65536\n1.0,0,0\n")
    return str(path)


PLACED = [
    Workload("sequential", rate_pages=100, write_bytes=1),
    Workload("sequential", rate_bytes=100, write_bytes=4096, seed=7),
    Workload("uniform", rate_pages=100),
    Workload("uniform", rate_bytes=3e6, write_bytes=3, seed=(1 << 64) - 1),
    Workload("uniform", rate_bytes=3e6, write_bytes=3000, seed=5),
    Workload("uniform", rate_bytes=3e6, write_bytes=5000, seed=5),
    Workload("uniform", rate_bytes=3e6, write_bytes=MIB, seed=6),
    Workload("hotset", rate_pages=7, write_bytes=64, hot_fraction=0.07, hot_share=0.93),
    Workload("hotset", rate_pages=7, hot_fraction=1.0, hot_share=0.0),
    Workload("hotset", rate_pages=7, hot_fraction=0.0, hot_share=0.5),
    Workload("zipf", rate_pages=100, zipf_exponent=1.0),
    Workload("zipf", rate_pages=100, zipf_exponent=0.0, write_bytes=512),
    Workload("zipf", rate_pages=100, zipf_exponent=1.37, seed=99),
]


@pytest.mark.parametrize("spec", PLACED, ids=Workload.describe)
@pytest.mark.parametrize(("memory", "page"), [(4 * MIB, 4096), (3 * MIB + 8192, 8192)])
def test_the_guest_writes_the_same_to_the_same_places(
    program: Path, spec: Workload, memory: int, page: int
) -> None:
    """Offset, length and content of writes near 0 and far on, whatever their size."""
    (writes,) = Program(spec, memory, page).writes
    assert writes is not None
    for first, count in ((0, 300), ((1 << 40) + 5, 40)):
        offsets = writes.offsets(first, count).tolist()
        lengths = writes.lengths(first, count).tolist()
        crcs = [zlib.crc32(row.tobytes()) for row in contents(spec.seed, first, count, spec.write_bytes)]
        expected = [
            f"{offset} {length} {crc}" for offset, length, crc in zip(offsets, lengths, crcs, strict=True)
        ]
        assert dump(program, spec, memory, page, [f"writes 0 {first} {count}"]) == expected


def test_the_guest_plays_a_recording(program: Path, tmp_path: Path) -> None:
    """Row after row, round after round."""
    spec = Workload("trace", trace=recording(tmp_path / "trace.csv"), seed=3)
    (writes,) = Program(spec, MIB).writes
    assert writes is not None
    got = dump(program, spec, MIB, 4096, ["writes 0 0 10"])
    assert [line.split()[:2] for line in got] == [
        [str(offset), str(length)]
        for offset, length in zip(writes.offsets(0, 10).tolist(), writes.lengths(0, 10).tolist(), strict=True)
    ]
    assert [int(line.split()[2]) for line in got] == [
        zlib.crc32(contents(3, n, 1, int(line.split()[1]))[0].tobytes()) for n, line in enumerate(got)
    ]


def test_each_device_has_a_seed_of_its_own(program: Path) -> None:
    """Device 2 of seed 5 writes what device 0 of seed 7 would."""
    other = dump(program, Workload(rate_pages=1, seed=7), MIB, 4096, ["writes 0 0 50"])
    assert dump(program, Workload(rate_pages=1, seed=5), MIB, 4096, ["writes 0 0 50"], device=2) == other


TIMED = [
    Workload("uniform", rate_pages=1000),
    Workload("uniform", rate_bytes=1 / 3, write_bytes=7),
    Workload("uniform", rate_pages=12345.678, burst=Burst(0.2, 0.1)),
    Workload("uniform", rate_pages=0.1, burst=Burst(1.0, 3.0)),
    Workload("idle"),
    Workload(
        "phases",
        phases=(
            Phase(0.3, Workload(rate_pages=1000)),
            Phase(0.001, Workload("idle")),
            Phase(0.25, Workload("zipf", rate_bytes=1e6, burst=Burst(0.5, 0.01))),
        ),
    ),
]
# (clock, writes at most): slices, a stall of three seconds, a generator that cannot keep up.
CLOCK = [(0, 99), (1, 99), (10**6, 99), (10**7, 5), (10**8, 10**6), (10**8, 10**6), (3 * 10**8 + 7, 100)]
CLOCK += [(3 * SECOND, 10**9), (3 * SECOND + 1, 0), (4 * SECOND, 300), (4 * SECOND, 300), (10**10, 10**9)]


def numbers(runs: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(phase, n) for phase, first, count in runs for n in range(first, first + count)]


@pytest.mark.parametrize("spec", TIMED, ids=Workload.describe)
def test_the_guest_writes_at_the_same_moments(program: Path, spec: Workload) -> None:
    """What is due, what is missed, and when to ask again, at every look at the clock."""
    start = 12_345
    pacer = Program(spec, MIB).pacer(start)
    got = dump(program, spec, MIB, 4096, [f"take {start + now} {limit}" for now, limit in CLOCK])
    for (now, limit), line in zip(CLOCK, got, strict=True):
        runs = pacer.take(start + now, limit)
        words, _, rest = line.partition("missed ")
        taken = [tuple(map(int, word.split(":"))) for word in words.split()]
        assert numbers(taken) == numbers([(run.phase, run.first, run.count) for run in runs])  # type: ignore[arg-type]
        assert rest == f"{pacer.missed} next {'never' if pacer.next_ns() is None else pacer.next_ns()}"


TYPED = [
    ("pattern=uniform dirty_rate=256p", {"dirty_rate": "256p"}),
    ("dirty_rate=2M write_size=64", {"dirty_rate": "2M", "write_size": "64"}),
    ("pattern=sequential dirty_rate=1.5MiB/s write_bytes=5000", {"dirty_rate": "1.5M", "write_size": "5000"}),
    ("pattern=uniform write_rate=1.25M write_size=1K seed=7", {"write_rate": "1.25M", "write_size": "1K"}),
    ("rate=2000p/s write_size=9000", {"rate": "2000p", "write_size": 9000}),
    ("rate=0.5p", {"dirty_rate": "0.5p"}),
    ("rate=256", {"rate": 256}),
    (
        "dirty_rate=4M on_ns=20000000 period_ns=100000000",
        {"dirty_rate": "4M", "burst": {"duty": 0.2, "period_seconds": 0.1}},
    ),
]


@pytest.mark.parametrize(("line", "values"), TYPED, ids=[line for line, _ in TYPED])
@pytest.mark.parametrize("page", [4096, 16384])
def test_a_rate_typed_by_hand_means_what_it_means_elsewhere(
    program: Path, line: str, values: dict[str, Any], page: int
) -> None:
    """`dirty_rate` and `write_rate` are what Workload, options and scenarios call so."""
    pacer = Program(Workload.from_dict({"pattern": "uniform", **values}), MIB, page).pacer(0)
    asked = [f"phase {line}", *(f"take {now} {limit}" for now, limit in CLOCK), ""]
    done = dumped(program, asked, page)
    assert done.returncode == 0, done.stdout + done.stderr
    for (now, limit), answer in zip(CLOCK, done.stdout.splitlines(), strict=True):
        runs = pacer.take(now, limit)
        taken = [tuple(map(int, word.split(":"))) for word in answer.partition("missed ")[0].split()]
        assert numbers(taken) == numbers([(run.phase, run.first, run.count) for run in runs])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "pattern=uniform rate_pages=256 write_bytes=8",
            "rate_pages=256: expected KEY=VALUE, and of keys one of",
        ),
        ("pattern=uniform 256", "256: expected KEY=VALUE"),
        ("pattern=randomly dirty_rate=8M", "pattern: expected idle|sequential|uniform"),
        ("pattern=uniform", "a rate above 0: dirty_rate=2000p"),
        ("dirty_rate=0", "a rate above 0"),
        ("dirty_rate=fast", "dirty_rate: pages a second (2000p) or their bytes (8M)"),
        ("dirty_rate=8X", "dirty_rate: pages a second"),
        ("write_rate=2000p", "write_rate: bytes written a second (8M)"),
        ("dirty_rate=8M write_rate=8M", "one of them"),
        ("dirty_rate=8M dirty_rate=9M", "dirty_rate: given twice"),
        ("dirty_rate=8M write_size=2M", "write_size: 1 to 1M"),
        ("dirty_rate=8M write_size=8 write_bytes=8", "write_size, write_bytes: one of them"),
        ("dirty_rate=8M seed=-1", "seed: expected a whole number or a size"),
        ("dirty_rate=8M seed=18446744073709551616", "seed: expected a whole number or a size"),
        ("dirty_rate=8M write_size=0.3", "write_size: expected a whole number or a size"),
        ("dirty_rate=8M hot_share=much", "hot_share: expected a number"),
        ("pattern=hotset dirty_rate=8M hot_share=1.5", "hot_fraction, hot_share: 0 to 1"),
    ],
)
def test_a_phase_that_cannot_be_is_refused_in_words(program: Path, line: str, said: str) -> None:
    """Nothing is taken for something else: not an unknown key, not a number that is none, not a rate of 0."""
    done = dumped(program, [f"phase {line}", ""], 4096)
    assert done.returncode == 1
    assert said in done.stdout


def test_a_recording_is_played_at_its_moments(program: Path, tmp_path: Path) -> None:
    """The same as a pacer in Python, over several rounds."""
    spec = Workload("trace", trace=recording(tmp_path / "trace.csv"))
    pacer = Program(spec, MIB).pacer(0)
    moments = [0, 10**8, 3 * 10**8, 5 * 10**8, 7 * 10**8, 9 * 10**8, SECOND, SECOND + 1, SECOND + 24 * 10**7]
    got = dump(program, spec, MIB, 4096, [f"take {now} 100" for now in moments])
    for now, line in zip(moments, got, strict=True):
        due = sum(run.count for run in pacer.take(now, 100))
        assert sum(int(word.split(":")[2]) for word in line.partition("missed")[0].split()) == due
        assert line.endswith(f"next {pacer.next_ns()}")


def test_what_a_guest_cannot_do_is_said(program: Path, tmp_path: Path) -> None:
    """A rate beyond 64 bits on the way out; a write larger than the memory by the guest itself."""
    with pytest.raises(ConfigError, match="out of the range of the guest program"):
        list(program_lines(Workload(rate_pages=1 << 50, burst=Burst(1e-14, 86400.0)), 4096))
    lines = [*program_lines(Workload(rate_pages=1, write_bytes=8192), 4096), "writes 0 0 1", ""]
    done = subprocess.run(
        [program, "--dump", "4096", "4096", "0"],
        input="\n".join(lines[1:]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "error: write_bytes: larger than the memory" in done.stdout

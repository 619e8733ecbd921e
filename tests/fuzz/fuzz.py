"""Fuzz, look at a finding again, and keep the corpus small: docs/fuzzing.md.

python tests/fuzz/fuzz.py run --seconds 3600 --jobs 1     (make fuzz)
python tests/fuzz/fuzz.py repro out/fuzz/findings/server/crash-...     (make fuzz-repro FILE=...)
python tests/fuzz/fuzz.py corpus
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fuzzkit
from fuzzkit import TARGETS

OUT = fuzzkit.REPOSITORY / "out" / "fuzz"
_REPORT_SECONDS = 30


@dataclass
class Result:
    """What fuzzing one target came to, over all of its processes."""

    target: str
    seconds: float = 0.0
    executions: int = 0
    edges: int = 0
    features: int = 0
    corpus_entries: int = 0
    findings: int = 0


def fuzz(target: str, seconds: float, seed: int, out: Path, say: threading.Lock) -> Result:
    """Fuzz `target` for that long; a process that found something has a successor."""
    result = Result(target)
    found = out / "findings" / target
    corpus = out / "corpus" / target
    for folder in (found, corpus):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(found.iterdir())
    began = reported = time.monotonic()

    def follow(run: fuzzkit.Run) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            with say:
                print(
                    f"{target}: {reported - began:.0f} of {seconds:.0f} s, "
                    f"{result.executions + run.executions} executions, {run.edges} edges, "
                    f"{len(set(found.iterdir()) - before)} findings",
                    flush=True,
                )

    while (left := seconds - (time.monotonic() - began)) >= 1:
        run = fuzzkit.run(
            target,
            f"-max_total_time={left:.0f}",
            f"-max_len={fuzzkit.MAX_INPUT_BYTES}",
            f"-seed={seed + result.findings}",
            f"-artifact_prefix={found}/",
            corpus,
            fuzzkit.corpus_of(target),
            follow=follow,
            nice=19,
        )
        result.executions += run.executions
        result.edges = max(result.edges, run.edges)
        result.features = max(result.features, run.features)
        result.corpus_entries = max(result.corpus_entries, run.corpus)
        new = len(set(found.iterdir()) - before)
        if run.status and not run.executions:
            raise SystemExit(f"{target} cannot be run (status {run.status}):\n{run.text}")
        if run.status:
            with say:
                print(f"{target}: found something\n{run.text}", flush=True)
        again = run.status and new == result.findings
        result.findings = new
        if again:  # it is in the corpus, where the next process would end as well
            break
    result.seconds = time.monotonic() - began
    return result


def table(results: list[Result]) -> str:
    """Return the results for people."""
    rows = [("target", "seconds", "executions", "edges", "features", "corpus", "findings")]
    rows += [
        (
            one.target,
            f"{one.seconds:.0f}",
            str(one.executions),
            str(one.edges),
            str(one.features),
            str(one.corpus_entries),
            str(one.findings),
        )
        for one in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def command_run(options: argparse.Namespace) -> int:
    """Fuzz all targets, for `--seconds` altogether; status 1 if something was found."""
    targets = options.target or list(TARGETS)
    jobs = min(options.jobs, len(targets))
    each = options.seconds * jobs / len(targets)
    out = options.out.absolute()
    say = threading.Lock()
    print(f"{len(targets)} targets, {each:.0f} s each, {jobs} at a time; findings go to {out / 'findings'}")
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda target: fuzz(target, each, options.seed, out, say), targets))
    print(table(results))
    if options.json:
        text = json.dumps({"kind": "fuzz", "version": 1, "targets": [vars(one) for one in results]}, indent=2)
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n")
    if any(one.findings for one in results):
        print('see one again: make fuzz-repro FILE=...; then docs/fuzzing.md, "What to do with a finding"')
        return 1
    return 0


def command_repro(options: argparse.Namespace) -> int:
    """Give inputs to the target that their folder is named after, and show what it says."""
    status = 0
    for path in options.file:
        target = options.target or path.absolute().parent.name
        if target not in TARGETS:
            raise SystemExit(f"{path}: which target? --target is one of {', '.join(TARGETS)}")
        run = fuzzkit.replay(target, [path])
        print(run.text)
        print(f"{path}: {'found again' if run.status else 'nothing is wrong'}")
        status |= bool(run.status)
    return status


def command_corpus(options: argparse.Namespace) -> int:
    """Make the corpus anew: the first inputs, and of what was found what covers more edges than they do."""
    with tempfile.TemporaryDirectory() as folder:
        write_first_inputs(Path(folder))
        for target in options.target or TARGETS:
            kept = Path(folder, target)
            before = fuzzkit.corpus_of(target)
            for path in before.glob("found-*"):  # one for each fault that was mended: they stay
                shutil.copy(path, kept)
            # atheris cannot merge: its process starts itself by a name that is no program.
            if target in fuzzkit.C_TARGETS:
                merge(target, kept, [one for one in (before, OUT / "corpus" / target) if one.is_dir()])
            shutil.rmtree(before, ignore_errors=True)
            shutil.copytree(kept, before)
            sizes = [path.stat().st_size for path in kept.iterdir()]
            print(f"{target}: {len(sizes)} inputs, {sum(sizes)} bytes")
    return 0


def write_first_inputs(folder: Path) -> None:
    """Write the first inputs of each target; pytest alone has the folders of the tests' kits in its path."""
    sys.path[:0] = fuzzkit.KITS
    import make_corpus

    make_corpus.write(folder)


def merge(target: str, kept: Path, sources: list[Path]) -> None:
    """Add to `kept` those inputs of `sources` that cover an edge which none there does."""
    limit = f"-max_len={fuzzkit.MAX_INPUT_BYTES}"
    run = fuzzkit.run(target, "-merge=1", "-use_counters=0", limit, kept, *sources)
    if run.status:
        raise SystemExit(f"{target} cannot be merged:\n{run.text}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help=command_run.__doc__)
    run.set_defaults(command=command_run)
    run.add_argument("--seconds", type=float, default=3600, help="for all targets together (3600)")
    run.add_argument("--jobs", type=int, default=1, help="targets at a time (1)")
    run.add_argument("--seed", type=int, default=int(time.time()), help="the same seed, the same inputs")
    run.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    run.add_argument("--out", type=Path, default=OUT, help="findings and the corpus that grows (out/fuzz)")
    run.add_argument("--json", metavar="FILE", help="the summary as JSON; - is stdout")
    repro = commands.add_parser("repro", help=command_repro.__doc__)
    repro.set_defaults(command=command_repro)
    repro.add_argument("file", nargs="+", type=Path)
    repro.add_argument("--target", choices=TARGETS, help="the folder's name otherwise")
    corpus = commands.add_parser("corpus", help=command_corpus.__doc__)
    corpus.set_defaults(command=command_corpus)
    corpus.add_argument("--target", action="append", choices=TARGETS)
    options = parser.parse_args()
    status: int = options.command(options)
    return status


if __name__ == "__main__":
    sys.exit(main())

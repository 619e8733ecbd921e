"""Runs the groups of a scenario on the workers of a Dask cluster: `vfu-dev lab run --dask ADDRESS`.

Dask carries the work there and the results back, and knows which workers there are. Added is what a
measurement needs: only machines that would make the points with the same versions take part, each makes one
group at a time, and a finished group is on the client's disk at once.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import signal
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distributed import Client, Future, TimeoutError, wait

from vfu_dev.errors import ConfigError, LabError
from vfu_dev.series import worker
from vfu_dev.series.artifacts import own_versions
from vfu_dev.series.folder import RunFolder, differing
from vfu_dev.series.merge import take
from vfu_dev.series.rows import COLUMNS, Row
from vfu_dev.series.run import RunReporter
from vfu_dev.series.work import Work

# Interval of the poll for new workers and for reports.
POLL_SECONDS = 0.5
# Without any worker that can make points for this long, a run ends; what is finished stays.
PATIENCE_SECONDS = 600.0
# Number of times that a group is begun, where its worker dies or cannot make it.
TRIES = 3


def run_on_dask(
    work: Work,
    address: str,
    out: Path,
    reporter: RunReporter,
    *,
    resume: bool = False,
    force: bool = False,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a scenario on a Dask cluster and return the summary, which is also `out`/summary.json.

    Args: address: of the scheduler, `tcp://HOST:PORT`, or the path of its scheduler file.
          reporter: gets what `run_scenario` gives it, but no observations of a Lab; and `again` (moves,
          point) when a group is made once more. The rest: see `run_scenario`.
    Raises: ConfigError: `out` holds something else. LabError: no scheduler, no worker that can make the
            points, or points that could not be made; finished ones are kept.
    """
    with _connect(address) as client:
        cluster = _Cluster(client, work, reporter)
        made_with = cluster.find_workers()
        folder = RunFolder(out, work.scenario, work.short, made_with)
        folder.prepare(resume=resume, force=force)
        reporter("plan", folder.plan())
        with _interrupt_between_steps() as asked_to_end:
            cluster.run(folder, asked_to_end)
        return folder.complete(command)


def _connect(address: str) -> Client:
    try:
        if Path(address).is_file():
            return Client(scheduler_file=address)
        return Client(address)
    except ValueError as error:
        raise ConfigError(
            f"--dask {address}: expected tcp://HOST:PORT, or a scheduler file: {error}"
        ) from error
    except OSError as error:
        raise LabError(
            f"--dask {address}: no scheduler answers; start one: dask scheduler ({error})"
        ) from error


@contextlib.contextmanager
def _interrupt_between_steps() -> Iterator[threading.Event]:
    """Have the first Ctrl-C set an event: inside one of Dask's calls it would leave its loop in disorder."""
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(_number: int, _frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class _Cluster:
    """The workers of one run.

    Attributes: `machines`: of each that takes part, its worker's address.
    """

    def __init__(self, client: Client, work: Work, reporter: RunReporter) -> None:
        self.client, self.work, self.reporter = client, work, reporter
        self.machines: dict[str, str] = {}
        self.topic = f"vfu-dev-{secrets.token_hex(6)}"
        self._made_with: dict[str, Any] | None = None
        self._answers: dict[str, dict[str, Any]] = {}  # of present workers
        self._aside: set[str] = set()
        self._refusals: dict[str, str] = {}
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._alone_since, self._waits = time.monotonic(), False
        self._begun: set[str] = set()  # points
        self._seen: Counter[int] = Counter()  # moves of each group

    # --- workers

    def find_workers(self) -> dict[str, Any]:
        """Return `versions` and `qemus` of the workers, as soon as there is one that can make the points."""
        told = False
        while True:
            self._poll()
            if self._made_with is not None:
                return self._made_with
            if not told and not self._answers:
                told = True
                self.reporter("note", {"text": "waits for a worker: dask worker ADDRESS --nthreads 1"})
            elif self._answers:
                # All are refused. Only others could make the points, and the user has to know that.
                raise LabError(f"no worker can make these points: {self._refused()}")
            time.sleep(POLL_SECONDS)

    def _poll(self) -> None:
        """Ask new workers what they have, forget those that left, and have one of each machine take part."""
        present = set(self.client.nthreads())
        self._answers = {address: one for address, one in self._answers.items() if address in present}
        self.machines = {name: address for name, address in self.machines.items() if address in present}
        if new := sorted(present - self._answers.keys()):
            found = self.client.run(worker.introduce, self.work.to_json(), workers=new, on_error="return")
            for address in new:
                # Without an answer it has just left, and is asked again if it has not.
                if not isinstance(answer := found.get(address), OSError):
                    self._judge(address, answer)
        for address, answer in self._answers.items():
            machine = str(answer["here"]["machine"]["id"]) if "here" in answer else ""
            if machine and machine not in self._aside:
                self.machines.setdefault(machine, address)
        if self.machines:
            self._alone_since, self._waits = time.monotonic(), False
        elif self._made_with is not None and not self._waits:
            self._waits = True
            self.reporter("note", {"text": "no worker is left that can make points: waits for one"})
        elif time.monotonic() - self._alone_since > PATIENCE_SECONDS:
            raise LabError(f"no worker that can make these points: {self._refused() or 'none came'}")

    def _judge(self, address: str, answer: Any) -> None:
        """Keep what a worker said of itself; a worker that is not fit is refused in words."""
        if isinstance(answer, Exception) or answer is None:
            kind = type(answer).__name__
            answer = {
                "error": f"vfu-dev {own_versions()['vfu-dev']} is not installed there ({kind}: {answer})"
            }
        if "here" in answer:
            here = answer["here"]
            own = {"versions": {**here["versions"], **own_versions()}, "qemus": here["qemus"]}
            wanted = self._made_with or own
            if differs := differing(here, wanted):
                answer = {"error": f"other versions: {', '.join(differs)}"}
            else:
                self._made_with = wanted
        self._answers[address] = answer
        if "error" in answer:
            self._refuse(address, answer["error"])

    def _refuse(self, address: str, text: str) -> None:
        self._refusals[address] = text
        self.reporter("note", {"text": f"worker {address} is refused: {text}"})

    def _refused(self) -> str:
        return "; ".join(f"{address}: {text}" for address, text in self._refusals.items())

    # --- groups

    def run(self, folder: RunFolder, asked_to_end: threading.Event) -> None:
        """Have every unfinished group made, unless `asked_to_end`, which is KeyboardInterrupt.

        Raises: LabError: some could not be made; the rest is in `folder`.
        """
        todo = deque(number for number, group in enumerate(folder.groups) if not folder.finished(group))
        tries: Counter[int] = Counter()
        lost: dict[int, str] = {}
        running: dict[Future[Any], tuple[int, str]] = {}  # the group, and the worker
        self.client.subscribe_topic(self.topic, lambda event: self._reports.put(event[1]))
        try:
            while todo or running:
                if asked_to_end.is_set():
                    raise KeyboardInterrupt
                ended = self._collect(folder, running)
                self._pass_reports(folder)
                self._poll()
                ended += self._let_go(running)
                for number, problem in ended:
                    if not problem:
                        continue
                    if tries[number] < TRIES:
                        todo.appendleft(number)
                    else:
                        lost[number] = problem
                busy = {address for _, address in running.values()}
                for address in set(self.machines.values()) - busy:
                    if todo:
                        tries[number := todo.popleft()] += 1
                        running[self._submit(number, tries[number], address)] = (number, address)
                with contextlib.suppress(TimeoutError):
                    wait(list(running), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
                if not running:
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            self._collect(folder, running)
            raise
        except OSError as error:  # CommClosedError among them
            raise LabError(f"the Dask scheduler is gone: {error}; finished points are kept") from error
        finally:
            self.client.cancel(list(running), force=True)
            self.client.unsubscribe_topic(self.topic)
        if lost:
            texts = "; ".join(f"{folder.groups[number][0].name}: {text}" for number, text in lost.items())
            raise LabError(f"{len(lost)} of {len(folder.groups)} groups of points could not be made: {texts}")

    def _submit(self, number: int, again: int, address: str) -> Future[Any]:
        """Give a group to a worker, and to no other: Dask would give a machine two at a time."""
        return self.client.submit(
            worker.make_group,
            self.work.to_json(),
            number,
            self.topic,
            key=f"{self.topic}-{number}-{again}",
            pure=False,
            workers=[address],
        )

    def _collect(
        self, folder: RunFolder, running: dict[Future[Any], tuple[int, str]]
    ) -> list[tuple[int, str]]:
        """Put what ended tasks brought into the folder; return their groups, each with what went wrong."""
        ended = []
        for future in [future for future in running if future.done()]:
            number, address = running.pop(future)
            if future.status == "finished":
                problem = self._keep(folder, number, future.result())
            else:
                error = future.exception() if future.status == "error" else None
                problem = f"{future.status} {type(error).__name__}: {error}" if error else str(future.status)
            if problem:
                self._set_aside(address, problem)
            ended.append((number, problem))
        return ended

    def _let_go(self, running: dict[Future[Any], tuple[int, str]]) -> list[tuple[int, str]]:
        """Return the groups whose worker has left, as `_collect` does."""
        gone = [future for future, (_, address) in running.items() if address not in self._answers]
        self.client.cancel(gone, force=True)
        left = [running.pop(future) for future in gone]
        for _, address in left:
            self.reporter("note", {"text": f"worker {address} is gone; another makes its point"})
        return [(number, f"its worker {address} was gone") for number, address in left]

    def _keep(self, folder: RunFolder, number: int, result: Mapping[str, Any]) -> str:
        if "error" in result:
            return str(result["error"])
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.path) as home:
            for name, content in result["files"].items():
                path = Path(home, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            take(folder, Path(home), folder.groups[number])
        return ""

    def _set_aside(self, address: str, problem: str) -> None:
        """Give no more groups to a machine on which one could not be made; others may do better."""
        for machine, of_machine in list(self.machines.items()):
            if of_machine == address:
                self._aside.add(machine)
                del self.machines[machine]
        self._refuse(address, problem)

    def _pass_reports(self, folder: RunFolder) -> None:
        """Give the reporter what the workers said; of a group that is made once more, that it is."""
        numbers = {point.name: number for number, point in enumerate(folder.points, 1)}
        while not self._reports.empty():
            said = self._reports.get()
            what, group = said["event"], said["group"]
            if what == "move":
                row = Row.from_cells(dict(zip(COLUMNS, said["cells"], strict=True)))
                self._seen[group] += 1
                self.reporter("move", {"row": row, "point": row.point})
            elif what == "point":
                if said["name"] in self._begun and said["name"] == folder.groups[group][0].name:
                    self.reporter("again", {"moves": self._seen[group], "point": said["name"]})
                    self._seen[group] = 0
                self._begun.add(said["name"])
                self.reporter("point", {"name": said["name"], "number": numbers[said["name"]]})
            else:
                self.reporter("note", {"text": f"{said['worker']}: {said['text']}"})

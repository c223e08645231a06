"""CPU time and memory of a command and everything it starts, daemons included.

`measure` runs the command under a launcher (this file, run as a script) that adopts orphans, so that whatever the
command starts stays below the launcher. Ten times a second the launcher reads the CPU clocks of all of them from /proc.
"""

from __future__ import annotations

import bisect
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_PERIOD_S = 0.1
# What a command leaves behind (Ray's daemons on their way out) has so long to end by itself.
_GRACE_S = 15.0
_PR_SET_CHILD_SUBREAPER = 36
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class ProcessUse:
    """One process: what it was called last, its CPU time, the most memory it held (own: without shared pages)."""

    name: str
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    peak_own_bytes: int = 0


@dataclass
class TreeUse:
    """A command with all its processes.

    Attributes:
        code: exit status.
        started, ended: time.monotonic(), which is the same clock in every process.
        cpu_s: of all processes: the larger of what was last read of each and what the kernel counted of those that
            were waited for. Either misses a little: the last tenth of a second, or children nobody waited for.
        timeline: (monotonic time, CPU seconds so far).
        processes: those with more than a tenth of a second of CPU time, the busiest first.
    """

    code: int = 0
    started: float = 0.0
    ended: float = 0.0
    cpu_s: float = 0.0
    timeline: list[tuple[float, float]] = field(default_factory=list)
    processes: list[ProcessUse] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        return self.ended - self.started

    def cpu_s_until(self, moment: float) -> float:
        """Return CPU seconds used until a moment (time.monotonic()), between two readings by a straight line."""
        times = [each for each, _ in self.timeline]
        after = bisect.bisect_left(times, moment)
        if after in (0, len(times)):
            return self.cpu_s if after else 0.0
        (t0, c0), (t1, c1) = self.timeline[after - 1 : after + 1]
        return c0 + (c1 - c0) * (moment - t0) / (t1 - t0)


def measure(command: list[str], *, log: Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> TreeUse:
    """Run a command to its end, its output into `log`; every process it started has ended afterwards."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result, log.open("wb") as output:
        launcher = [sys.executable, "-S", __file__, result.name, *command]
        subprocess.run(launcher, stdout=output, stderr=output, env=env, cwd=cwd, check=True)
        values = json.loads(Path(result.name).read_text())
    processes = [ProcessUse(**each) for each in values.pop("processes")]
    return TreeUse(**{**values, "timeline": [tuple(each) for each in values["timeline"]], "processes": processes})


class _Watcher:
    """Reads the clocks of all processes below this one."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], ProcessUse] = {}
        self.timeline: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self.read()

    def read(self) -> None:
        """Read every process once."""
        stats = {int(entry): stat for entry in os.listdir("/proc") if entry.isdigit() and (stat := _stat(entry))}
        children: dict[int, list[int]] = {}
        for pid, stat in stats.items():
            children.setdefault(int(stat[1]), []).append(pid)
        below = list(children.get(os.getpid(), []))
        for pid in below:
            below += children.get(pid, [])
            self._note(pid, stats[pid])
        self.timeline.append((time.monotonic(), sum(each.cpu_s for each in self.found.values())))

    def _note(self, pid: int, stat: list[str]) -> None:
        # Fields of proc(5), counted from the state: utime 11, stime 12, starttime 19.
        use = self.found.setdefault((pid, int(stat[19])), ProcessUse(""))
        use.cpu_s = max(use.cpu_s, (int(stat[11]) + int(stat[12])) / _TICKS_PER_S)
        try:
            name = _command_line(pid)
            # Between two tasks, Ray's workers are called IDLE; the task tells more.
            use.name = name if name and not (use.name and "IDLE" in name) else use.name
            _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        except (OSError, ValueError):  # It has just ended.
            return
        use.peak_rss_bytes = max(use.peak_rss_bytes, resident * _PAGE_BYTES)
        use.peak_own_bytes = max(use.peak_own_bytes, (resident - shared) * _PAGE_BYTES)


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]


def _stat(pid: str) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _wait_for_all(watcher: _Watcher) -> None:
    """Reap the orphans; what does not end by itself is killed."""
    patience_ends = time.monotonic() + _GRACE_S
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            continue
        time.sleep(0.02)
        if time.monotonic() > patience_ends:
            watcher.read()
            for stray in _children():
                os.kill(stray, 9)


def _children() -> list[int]:
    stats = {int(entry): _stat(entry) for entry in os.listdir("/proc") if entry.isdigit()}
    return [pid for pid, stat in stats.items() if stat and int(stat[1]) == os.getpid()]


def launch(result: Path, command: list[str]) -> dict[str, Any]:
    """Run the command under this process and write its TreeUse as JSON."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    use = TreeUse(started=time.monotonic())
    with _Watcher() as watcher:
        process = subprocess.Popen(command)
        use.code = process.wait()
        use.ended = time.monotonic()
        _wait_for_all(watcher)
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = sorted(watcher.found.values(), key=lambda each: -each.cpu_s)
    use.cpu_s = max(sum(each.cpu_s for each in found), waited_for.ru_utime + waited_for.ru_stime)
    use.timeline = [(use.started, 0.0), *watcher.timeline, (time.monotonic(), use.cpu_s)]
    use.processes = [each for each in found if each.cpu_s > 0.1]
    values = asdict(use)
    result.write_text(json.dumps(values))
    return values


if __name__ == "__main__":
    launch(Path(sys.argv[1]), sys.argv[2:])

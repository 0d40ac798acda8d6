"""Wall time, CPU time and peak memory of a command, by two measures of memory, looked at every 20 ms.

`peak_rss_bytes` is VmHWM in /proc of the command or the largest process that it started: all resident pages, also those
of files that are mapped (libraries, weights), which the system can take back. (What `wait4` says is no such figure: it
begins with the pages of whoever started the command.) `peak_anonymous_bytes` is the largest sum of RssAnon over the
command and its children: what was allocated, which the system cannot take back.
"""

import dataclasses
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LOOK_EVERY_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Use:
    """What a command took.

    Attributes:
        status: It exited with this; negative where a signal ended it.
        wall_seconds, cpu_seconds: From its start to its end, children included.
        peak_rss_bytes, peak_anonymous_bytes: See above.
        peak_anonymous_bytes_of_command: The same without its children.
        peak_anonymous_bytes_of_child: The same of the largest of these.
    """

    status: int
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    peak_anonymous_bytes_of_command: int
    peak_anonymous_bytes_of_child: int


def run_measured(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Use:
    """Run a command to its end, stdout and stderr to files.

    Args:
        command: Words.
        log: For stderr; stdout goes beside it, with the suffix ".out".
        environment: Of the command; this process's by default.
    """
    began, resident, whole, own, child = time.perf_counter(), 0, 0, 0, 0
    with log.open("wb") as errors, log.with_suffix(".out").open("wb") as out:
        process = subprocess.Popen(list(command), stdout=out, stderr=errors, env=environment)
        try:
            while True:
                found, status, usage = os.wait4(process.pid, os.WNOHANG)
                if found:
                    break
                tree = [_status(pid) for pid in (process.pid, *descendants(process.pid))]
                resident = max(resident, *(fields.get("VmHWM", 0) for fields in tree))
                anonymous = [fields.get("RssAnon", 0) for fields in tree]
                whole, own = max(whole, sum(anonymous)), max(own, anonymous[0])
                child = max(child, *anonymous[1:], 0)
                time.sleep(LOOK_EVERY_SECONDS)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    wall, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    return Use(process.returncode, wall, cpu, resident, whole, own, child)


def descendants(pid: int) -> list[int]:
    """All processes that a process started and that are there, and those that they started."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in files for child in _read(file).split()]
    return children + [later for child in children for later in descendants(child)]


def status_bytes(pid: int, field: str) -> int:
    """A field of /proc/PID/status in bytes: RssAnon, VmRSS, VmHWM (the peak of VmRSS); 0 where there is none."""
    return _status(pid).get(field, 0)


def _status(pid: int) -> dict[str, int]:
    lines = [line.split() for line in _read(Path(f"/proc/{pid}/status")).splitlines() if line.endswith(" kB")]
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in lines}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""

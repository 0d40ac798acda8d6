"""Processes that search together, by KerasTuner's own protocol: a chief hands out trials, workers run them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from tfxfer.errors import InputError
from tfxfer.runtime.progress import Progress

ID, ADDRESS, PORT = "KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT"
CHILD = "TFXFER_SEARCH_CHILD"  # of a search on one machine: this process ends when its trials do
MAX_RESTARTS = 3
GRACE_SECONDS = 10.0


def role(environment: Mapping[str, str] = os.environ) -> str:
    """What this process is in a search: "alone", "chief" or "worker".

    Raises:
        InputError: Where the environment says it in part.

    Example:
        >>> role({}), role({ID: "worker-1", ADDRESS: "10.0.0.1", PORT: "8000"})
        ('alone', 'worker')
    """
    given = [name for name in (ID, ADDRESS, PORT) if environment.get(name)]
    if ADDRESS not in given and PORT not in given:
        return "alone"
    missing = [name for name in (ID, ADDRESS, PORT) if name not in given]
    if missing:
        raise InputError(
            f"{' and '.join(given)} say that several processes search together, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; set all three, or none."
        )
    return "chief" if "chief" in environment[ID] else "worker"


def is_child(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether another process of ours trains the winner."""
    return bool(environment.get(CHILD))


def run_members(command: Sequence[str], num_workers: int, progress: Progress) -> None:
    """Start a chief and workers on this machine, and wait until the workers have nothing left to do.

    A worker that is killed is started again under its name, whereupon the chief gives it the trial that it was at.

    Args:
        command: Of each process.
        num_workers: At least 2.
        progress: Told about restarts.

    Raises:
        InputError: Where a process ends with an error, or a worker is killed again and again.
    """
    if num_workers < 2:
        raise InputError(f"--workers must be at least 2, not {num_workers}; without it one process searches.")
    common = {**os.environ, CHILD: "1", ADDRESS: "127.0.0.1", PORT: str(_free_port())}
    with _all_ended() as processes:

        def start(name: str) -> None:
            # Not the descriptor 2 that they would inherit: `quiet_libraries` has sent that one nowhere.
            processes[name] = subprocess.Popen(
                command, env={**common, ID: name}, stdout=subprocess.DEVNULL, stderr=sys.stderr
            )

        start("chief")
        names = [f"worker-{number}" for number in range(1, num_workers + 1)]
        restarts = dict.fromkeys(names, 0)
        for name in names:
            start(name)
        while names:
            time.sleep(0.2)
            if processes["chief"].poll() not in (None, 0):
                raise InputError(f"The chief of the search ended with status {processes['chief'].poll()}; see above.")
            for name in list(names):
                status = processes[name].poll()
                if status is None:
                    continue
                if status == 0:
                    names.remove(name)
                elif status > 0:
                    raise InputError(f"{name} of the search ended with status {status}; see above.")
                elif restarts[name] >= MAX_RESTARTS:
                    raise InputError(f"{name} of the search was killed {MAX_RESTARTS + 1} times; is memory short?")
                else:
                    restarts[name] += 1
                    progress.note(f"{name} was killed by signal {-status}; it is started again")
                    start(name)


@contextlib.contextmanager
def _all_ended() -> Iterator[dict[str, subprocess.Popen]]:
    """No process outlives the block."""
    processes: dict[str, subprocess.Popen] = {}
    try:
        yield processes
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE_SECONDS
        for process in processes.values():
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])

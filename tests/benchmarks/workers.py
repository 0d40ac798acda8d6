"""Processes that wait for their turn: each is one thing to be measured, and only one of them works at a time."""

import contextlib
import json
import os
import select
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memory import status_bytes

LOOK_EVERY_SECONDS = 0.05


class Worker:
    """A script that answers as peers/speed.py has it.

    Args:
        python: Its interpreter.
        script: Of peers/, or tfxfer_speed.py.
        told: What it is to do.
        log: For its stderr; `told` goes beside it.
        environment: Of the process.

    Attributes:
        facts: Its first answer; empty before `ready`.
        peak_anonymous_bytes: The largest seen while it got ready and while it worked.
    """

    def __init__(self, python: Path, script: Path, told: Mapping[str, Any], log: Path, environment: Mapping[str, str]):
        self.facts: dict[str, Any] = {}
        self.peak_anonymous_bytes, self._log = 0, log
        file = log.with_suffix(".json")
        file.write_text(json.dumps(dict(told)), encoding="utf-8")
        self._command = [str(python), str(script), str(file)]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=dict(environment)
            )

    def ready(self) -> None:
        """Wait until it is."""
        self.facts = self._answer()

    def work(self, seconds: float) -> tuple[float, float]:
        """Let it work for about so long: images a second of wall time, and a second of CPU time."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n".encode())
        self._process.stdin.flush()
        found = self._answer()
        return found["images"] / found["seconds"], found["images"] / max(found["cpu_seconds"], 1e-6)

    @property
    def peak_rss_bytes(self) -> int:
        """Of the process until now, mapped files included."""
        return status_bytes(self._process.pid, "VmHWM")

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe and pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        while not select.select([out], [], [], LOOK_EVERY_SECONDS)[0]:
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, status_bytes(self._process.pid, "RssAnon"))
        line = out.readline()
        if not line:
            self._process.wait()
            tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{' '.join(self._command)}\nended with status {self._process.returncode}:\n{tail}")
        return json.loads(line)


@contextlib.contextmanager
def all_ended(workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
    """End whatever is in the dict, however the block ends."""
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def alternate(workers: Mapping[str, Worker], rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Let each work in turn, so many rounds; every second round backwards, so that a drift hits all alike.

    Returns:
        For each: `rates` (images a second, one a round), `cpu_rates` (a second of CPU time), `peak_rss_bytes`,
        `peak_anonymous_bytes`, `facts`.
    """
    rates: dict[str, list[tuple[float, float]]] = {name: [(0.0, 0.0)] * rounds for name in workers}
    for number in range(rounds):
        for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
            rates[name][number] = workers[name].work(seconds)
    return {
        name: {
            "rates": [round(wall, 2) for wall, _ in rates[name]],
            "cpu_rates": [round(cpu, 2) for _, cpu in rates[name]],
            "peak_rss_bytes": worker.peak_rss_bytes,
            "peak_anonymous_bytes": worker.peak_anonymous_bytes,
            "facts": worker.facts,
        }
        for name, worker in workers.items()
    }


def environment_of(threads: int, python_path: str) -> dict[str, str]:
    """Of a process whose numeric libraries have so many threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    return {
        **os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": python_path, **dict.fromkeys(names, str(threads))
    }  # fmt: skip

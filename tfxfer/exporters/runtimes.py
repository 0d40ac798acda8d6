"""Fresh processes that reopen artifacts: see reopen.py for what runs inside."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import InputError
from tfxfer.exporters.samples import Task

TIME_LIMIT_SECONDS = 1800


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What an artifact gave.

    Attributes:
        runtime: Name and version.
        class_names: As the artifact tells them.
        probabilities, classes: By name of the task; float32 (n, K), str (n,).
        problem: Why there is nothing of the above; empty otherwise.
    """

    runtime: str = ""
    class_names: tuple[str, ...] = ()
    probabilities: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    classes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    problem: str = ""


class Reopened:
    """One artifact's runtime, in a process that starts at once and waits to be told of the artifact.

    Starting before the artifact exists hides the seconds that `import tensorflow` takes.
    """

    def __init__(self, format_name: str, scratch: Path):
        here = Path(__file__).parent
        program = here / f"reopen_{format_name}.py"
        if not program.is_file():
            raise InputError(f"Format {format_name!r} has no {program.name} that could verify it.")
        self._results = scratch / format_name
        self._results.mkdir()
        self._errors = (scratch / f"{format_name}.stderr").open("w+b")
        # -P: no script folder on the path, where our onnx.py would hide the real one. No GPU: the parent holds its
        # memory, and the reference is float32 arithmetic.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(here / "reopen.py"), str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONIOENCODING": "utf-8"},
        )

    def submit(self, artifact: Path, folder: Path, tasks: Sequence[Task]) -> None:
        """Hand over the artifact and the inputs; returns at once."""
        request: dict[str, Any] = {
            "artifact": str(artifact),
            "folder": str(folder),
            "results": str(self._results),
            "tasks": [dataclasses.asdict(task) for task in tasks],
        }
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already; `result` says of what
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.close()

    def result(self) -> Outcome:
        """Wait for it to finish."""
        try:
            status = self._process.wait(TIME_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(problem=f"it did not answer within {TIME_LIMIT_SECONDS} seconds")
        if status != 0:
            return Outcome(problem=f"it does not run in a fresh process ({self._last_error(status)})")
        answer = json.loads((self._results / "result.json").read_text(encoding="utf-8"))
        probabilities, classes = {}, {}
        for name in answer["done"]:
            with np.load(self._results / f"{name}.npz") as stored:
                probabilities[name], classes[name] = stored["probabilities"], stored["classes"]
        return Outcome(answer["runtime"], tuple(answer["class_names"]), probabilities, classes)

    def close(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._errors.close()

    def _last_error(self, status: int) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit status {status}"


@contextlib.contextmanager
def reopened(formats: Sequence[str]) -> Iterator[tuple[dict[str, Reopened], Path]]:
    """A process for each format, and a scratch folder for their inputs; both gone at the end."""
    with tempfile.TemporaryDirectory(prefix="tfxfer-verify-") as name, contextlib.ExitStack() as stack:
        runtimes = {}
        for format_name in formats:
            runtimes[format_name] = Reopened(format_name, Path(name))
            stack.callback(runtimes[format_name].close)
        yield runtimes, Path(name)

"""What every peer of throughput.py shares: it gets ready, then works when it is told to. Imports nothing but NumPy.

A peer is a script `PEER.py TOLD.json`, and the file says what it is to do. Ready, it writes a line of JSON with facts
of its own; then for each line with a number on stdin it works for about so many seconds and answers
{"images", "seconds", "cpu_seconds"}. It ends with stdin.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# For about so many seconds; images, and the wall and the CPU seconds that they took.
Work = Callable[[float], tuple[int, float, float]]


def serve(make: Callable[[dict[str, Any]], tuple[Work, dict[str, Any]]]) -> int:
    """Make the work that the file asks for, and do it as often as stdin says."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(facts: dict[str, Any]) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    work, facts = make(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    answer(facts)
    for line in sys.stdin:
        images, seconds, cpu = work(float(line))
        answer({"images": images, "seconds": seconds, "cpu_seconds": cpu})
    return 0


def now() -> tuple[float, float]:
    """Wall and CPU seconds, of all threads."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """Wall and CPU seconds since then."""
    wall, cpu = now()
    return wall - began[0], cpu - began[1]


def repeated(step: Callable[[], int]) -> Work:
    """Calls `step`, which gives how many images it saw, until time is up; called once before, to warm up."""
    step()

    def work(wanted: float) -> tuple[int, float, float]:
        began, images = now(), 0
        while images == 0 or time.perf_counter() - began[0] < wanted:
            images += step()
        return images, *since(began)

    return work


class BatchTimes:
    """When batches ended. The rate is that between the first and the last of them, so that what `fit` does before and
    after its batches counts for nobody.

    Args:
        batch_size: Images a batch.
    """

    def __init__(self, batch_size: int):
        self.batch_size, self.ends = batch_size, list[tuple[float, float]]()

    def begin(self, wanted: float) -> None:
        self.ends, self.wanted = [], wanted

    def end_of_batch(self) -> bool:
        """Note one; whether time is up."""
        self.ends.append(now())
        return len(self.ends) > 2 and self.ends[-1][0] - self.ends[0][0] >= self.wanted

    def found(self) -> tuple[int, float, float]:
        (wall, cpu), (wall_end, cpu_end) = self.ends[0], self.ends[-1]
        return (len(self.ends) - 1) * self.batch_size, wall_end - wall, cpu_end - cpu


def in_batches(images: Sequence, size: int) -> list:
    """Whole batches only."""
    return [images[start : start + size] for start in range(0, len(images) - size + 1, size)]

"""The journal of a run: what is finished of its training, and the point that the open part has reached.

A training is a chain of units: the probe, a run at each learning rate, the choice of a blend, the refit. A resumed run
walks the same chain; a finished unit is taken from the journal, as measured, the open one goes on from its checkpoint.
"""

import contextlib
import hashlib
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfxfer.errors import CheckError, Terminated
from tfxfer.train.checkpoint import Checkpoints, read_checkpoint, write_checkpoint

SAVE_EVERY_SECONDS = 30.0
# A save may take so much of the time between two of them.
SAVE_SHARE = 0.05
# So long after SIGTERM the open unit may take to reach the end of its batch, the first of which is also compiled; then
# the process ends with what was saved before.
GRACE_SECONDS = 7.0

Arrays = dict[str, np.ndarray]
Facts = dict[str, Any]


class NotSavedWarning(UserWarning):
    """A checkpoint could not be written; training goes on, and cannot be resumed from here."""


class _Ending:
    """Whether the process was told to end, and how many open units keep their state; journals of a run share it."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.num_open = 0


class Journal:
    """Without a folder: nothing is kept, nothing is resumed.

    Args:
        folder: `checkpoints/` of a run.
        every_seconds: How long the open unit goes on before it is saved again.

    Example:
        >>> journal = Journal()
        >>> journal.memo("twice", lambda: ({"x": np.ones(2)}, {"n": 2}))[1]
        {'n': 2}
    """

    def __init__(self, folder: Path | None = None, *, every_seconds: float = SAVE_EVERY_SECONDS):
        self.folder, self.every_seconds = folder, every_seconds
        self.resumed: list[str] = []
        self._made: set[str] = set()
        self._ending = _Ending()
        self._again: threading.Timer | None = None

    def child(self, name: str) -> "Journal":
        """A journal of its own in a folder of this one's, for another training; SIGTERM is told to both."""
        journal = Journal(self.folder and self.folder / name, every_seconds=self.every_seconds)
        journal._ending = self._ending
        return journal

    def memo(self, name: str, make: Callable[[], tuple[Arrays, Facts]]) -> tuple[Arrays, Facts]:
        """What `make` returns; of a unit that is finished what it returned then. For units of seconds."""
        return self.run(name, lambda unit: make(), saves=False)

    def run(
        self, name: str, make: Callable[["OpenUnit"], tuple[Arrays, Facts]], *, saves: bool = True
    ) -> tuple[Arrays, Facts]:
        """What `make` returns; of a unit that is finished what it returned then.

        Args:
            name: Of the unit, the same at each walk.
            make: Told where it keeps its state while it is at work; gives arrays by name, and facts that JSON can hold.
            saves: Whether it does keep it, so that SIGTERM waits for that.

        Raises:
            Terminated: Where the process was told to end.
        """
        path = self._path(name)
        if path is not None:
            with contextlib.suppress(CheckError):  # a damaged one is made again
                found = read_checkpoint(path)
                if name not in self._made:
                    self.resumed.append(name)
                return found
        unit = OpenUnit(self, name, Checkpoints(path.with_suffix("")) if path else None)
        self._ending.num_open += saves
        try:
            arrays, facts = make(unit)
        finally:
            self._ending.num_open -= saves
        if path is not None and self._try(lambda: write_checkpoint(path, arrays, facts)):
            self._made.add(name)
            unit.forget()
        if self._ending.asked.is_set():
            raise Terminated("Told to end by SIGTERM; what was reached is saved, go on with --resume.")
        return arrays, facts

    def clear(self) -> None:
        """Forget everything: the run is complete."""
        if self.folder and self.folder.is_dir():
            shutil.rmtree(self.folder)

    @contextlib.contextmanager
    def ends_on_sigterm(self) -> Iterator[None]:
        """SIGTERM lets the open unit save itself and raise `Terminated`; elsewhere in the block it ends at once.

        A second one ends at once everywhere, and comes by itself after `GRACE_SECONDS`.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = signal.signal(signal.SIGTERM, self._end)
        try:
            yield
        finally:
            if self._again is not None:
                self._again.cancel()
            signal.signal(signal.SIGTERM, before)

    def _end(self, *_: object) -> None:
        if self._ending.asked.is_set():
            raise Terminated("Told to end by SIGTERM; go on with --resume from what was saved before.")
        if not self._ending.num_open:
            raise Terminated("Told to end by SIGTERM; go on with --resume.")
        self._ending.asked.set()
        main = threading.main_thread().ident
        assert main is not None  # it is at work
        self._again = threading.Timer(GRACE_SECONDS, signal.pthread_kill, (main, signal.SIGTERM))
        self._again.daemon = True
        self._again.start()

    def _path(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        short = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)[:60]
        return self.folder / f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.unit"

    def _try(self, write: Callable[[], None]) -> bool:
        try:
            write()
            return True
        except OSError as error:
            warnings.warn(
                f"A checkpoint in {self.folder} could not be written ({error.strerror or error}); training goes on, "
                "but can only be resumed from the one before.",
                NotSavedWarning,
                stacklevel=3,
            )
            return False


class OpenUnit:
    """Where the state of a unit is kept while it is at work."""

    def __init__(self, journal: Journal, name: str, kept: Checkpoints | None):
        self._journal, self._name, self._kept = journal, name, kept
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0

    def state(self) -> tuple[Arrays, Facts] | None:
        """What was reached before the process ended; None for a fresh start."""
        found = self._kept.latest() if self._kept else None
        if found:
            self._journal.resumed.append(f"{self._name} at {found[1].get('at', 'its checkpoint')}")
        return found

    def due(self) -> bool:
        """Whether it is time to save."""
        if self._journal._ending.asked.is_set():
            return True
        if self._kept is None:
            return False
        wait = max(self._journal.every_seconds, self._save_seconds / SAVE_SHARE)
        return time.monotonic() - self._saved_at >= wait

    def save(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Save the state.

        Raises:
            Terminated: Where the process was told to end.
        """
        began = time.monotonic()
        kept, saved = self._kept, False
        if kept is not None:
            saved = self._journal._try(lambda: kept.save(arrays, facts))
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - began
        if self._journal._ending.asked.is_set():
            told = "what was reached is saved, go on with --resume" if saved else "nothing could be saved"
            raise Terminated(f"Told to end by SIGTERM; {told}.")

    def forget(self) -> None:
        """The unit is finished, its result is the journal's: the way there is no longer needed."""
        if self._kept:
            self._kept.clear()
            with contextlib.suppress(OSError):
                self._kept.folder.rmdir()

"""How long work tells its user where it is; the base class says nothing."""

import sys
import time


class Progress:
    """What workflows report to, and silence. The command line shows a bar; `fit` in Python writes `Lines`."""

    def phase(self, name: str, total: int | None = None) -> None:
        """A phase begins; `total` is its number of steps where that is known."""

    def update(self, done: int, total: int | None = None) -> None:
        """So many steps of the phase are done."""

    def note(self, text: str) -> None:
        """One line worth keeping."""

    def row(self, text: str) -> None:
        """A line of a table that grows, shown wherever progress is; the same as a note where nothing else is said."""
        self.note(text)


class Lines(Progress):
    """A plain line on stderr for each phase and note, with the seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def phase(self, name: str, total: int | None = None) -> None:
        self.note(name)

    def note(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", file=sys.stderr)

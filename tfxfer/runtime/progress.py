"""How long work tells its user where it is; the base class says nothing."""


class Progress:
    """What workflows report to. The command line shows it on stderr; in Python it is silent unless one is given."""

    def phase(self, name: str, total: int | None = None) -> None:
        """A phase begins; `total` is its number of steps where that is known."""

    def update(self, done: int, total: int | None = None) -> None:
        """So many steps of the phase are done."""

    def note(self, text: str) -> None:
        """One line worth keeping."""

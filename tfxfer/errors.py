"""What can go wrong, and the exit status each kind gives the command line."""

import difflib
from collections.abc import Iterable


class TfxferError(Exception):
    """Base of every error that tfxfer raises on purpose: one clear sentence, no traceback on the command line."""

    exit_status = 2


class InputError(TfxferError, ValueError):
    """Bad usage or bad input: says what, where, what was expected and what to do (exit 2)."""

    exit_status = 2


class CheckError(TfxferError):
    """A check of ours failed: parity of an export, the freeze audit (exit 1)."""

    exit_status = 1


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A hint with near matches of `name`, or the whole list where it is short.

    Example:
        >>> did_you_mean("mobilenet_v2", ["mobilenet_v2_imagenet", "digits_cnn"])
        "Did you mean 'mobilenet_v2_imagenet'?"
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near += [option for option in known if name and name in option and option not in near]
    if near:
        return "Did you mean " + " or ".join(repr(option) for option in near[:3]) + "?"
    if len(known) <= 12:
        return "Known: " + ", ".join(known) + "."
    return f"{len(known)} are known."


class Interrupted(TfxferError):
    """The user stopped a training; what was best is kept (exit 130)."""

    exit_status = 130


class Terminated(SystemExit):
    """The process was told to end (SIGTERM); what was reached is saved (exit 143).

    It comes in the middle of anything, so it is no `Exception`: code that tries something else when a file or a
    conversion fails must not take it for such a failure.
    """

    exit_status = 143

    def __init__(self, told: str):
        super().__init__(told)
        self.code = self.exit_status

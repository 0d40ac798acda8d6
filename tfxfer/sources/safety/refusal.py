"""How the gate says no, and the bounds that all of its parts share."""

from pathlib import Path

from tfxfer.errors import InputError

# What is parsed whole (configs, headers, pickles) may have this many bytes.
MAX_CONFIG_BYTES = 16 * 2**20
# A file may declare this much more than it holds before it counts as a bomb; what is small harms nobody.
MAX_EXPANSION = 100
SMALL_BYTES = 64 * 2**20


def refusal(path: str | Path, reason: str, advice: str) -> InputError:
    """The one sentence of a refusal, to be raised.

    Args:
        path: The model file as the user named it.
        reason: What was found, with the member, layer or op.
        advice: What to do.

    Returns:
        The error.

    Example:
        >>> print(refusal("a.keras", "its layer 'f' is a Lambda", "build it in code"))
        'a.keras' was not loaded: its layer 'f' is a Lambda; build it in code.
    """
    return InputError(f"{str(path)!r} was not loaded: {reason}; {advice}.")


def shown(name: object) -> str:
    """A name out of an untrusted file for a message: quoted, printable, short.

    Example:
        >>> shown("a" * 200 + chr(10))[-5:]
        "aaa'…"
    """
    text = ascii(name)
    return text if len(text) <= 100 else text[:98] + "'…"


def expands_too_much(declared_bytes: int, stored_bytes: int) -> bool:
    """Whether `stored_bytes` of a file would become far more in memory.

    Example:
        >>> expands_too_much(2**40, 4800), expands_too_much(2**20, 10)
        (True, False)
    """
    return declared_bytes > SMALL_BYTES and declared_bytes > MAX_EXPANSION * stored_bytes

"""Which machines train together, as the environment variable TF_CONFIG says it."""

import dataclasses
import json
import os
from collections.abc import Mapping

from tfxfer.errors import InputError

STRATEGIES = ("auto", "none", "mirrored", "multi_worker")
VARIABLE = "TF_CONFIG"
EXAMPLE = '{"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, "task": {"type": "worker", "index": 0}}'

_OR_NONE = "correct it, or give strategy 'none'"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of one training.

    Attributes:
        addresses: HOST:PORT of each; the first one's process is the chief.
        index: Of this process among them.
    """

    addresses: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this process decides and writes."""
        return self.index == 0


def read_cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """The cluster of TF_CONFIG; None where it is not set or names one worker only.

    Raises:
        InputError: Where it is wrong.

    Example:
        >>> told = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
        >>> read_cluster({"TF_CONFIG": told})
        Cluster(addresses=('a:1', 'b:1'), index=1)
    """
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return None
    try:
        told = json.loads(text)
        if not told.get("cluster"):
            return None
        jobs = {name: tuple(map(str, addresses)) for name, addresses in told["cluster"].items()}
        kind, index = str(told["task"]["type"]), int(told["task"]["index"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{VARIABLE} must look like {EXAMPLE}, not {text[:200]!r}; {_OR_NONE}.") from None
    others = sorted(set(jobs) - {"chief", "worker"})
    if others:
        raise InputError(
            f"{VARIABLE} names the job {others[0]!r}; a training has workers, and at most a chief; {_OR_NONE}."
        )
    if not 0 <= index < len(jobs.get(kind, ())):
        raise InputError(
            f"{VARIABLE} says that this process is {kind} {index}, which its cluster does not have; {_OR_NONE}."
        )
    addresses = jobs.get("chief", ()) + jobs.get("worker", ())
    if len(set(addresses)) < len(addresses) or len(jobs.get("chief", ())) > 1:
        raise InputError(
            f"{VARIABLE} must name each worker once and at most one chief, not {', '.join(addresses)}; {_OR_NONE}."
        )
    if len(addresses) == 1:
        return None
    return Cluster(addresses, index + (len(jobs.get("chief", ())) if kind == "worker" else 0))


def cluster_for(strategy: object) -> Cluster | None:
    """The cluster that a training is to run on; None for this machine alone.

    Args:
        strategy: An entry of `STRATEGIES`, or an object of TensorFlow's.

    Raises:
        InputError: Where the name is wrong, or several machines are asked for and not named.
    """
    if not isinstance(strategy, str):
        return None
    if strategy not in STRATEGIES:
        raise InputError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}.")
    cluster = read_cluster() if strategy in ("auto", "multi_worker") else None
    if strategy == "multi_worker" and cluster is None:
        raise InputError(
            f"strategy 'multi_worker' wants several workers; set {VARIABLE} on each machine, such as {EXAMPLE}."
        )
    return cluster

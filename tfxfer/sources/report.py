"""What became of every layer when weights were loaded: nothing is left out in silence."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tfxfer.errors import InputError

# Below this share of the parameters what fits by name or shape is chance, unless a part was asked for.
CHANCE_SHARE = 0.02
STATES = ("matched", "renamed", "differs", "missing", "unused")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer that has weights.

    Attributes:
        layer: Its name in the model; for "unused" in the file.
        state: "matched" (same name and shapes, loaded), "renamed" (loaded from another name), "differs" (shapes or
            variables differ, left as it was), "missing" (nothing in the file for it, left as it was), "unused" (in the
            file, nothing in the model for it).
        num_parameters: Numbers in its weights.
        detail: The other name, or where the shapes differ.
    """

    layer: str
    state: str
    num_parameters: int
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of each layer.

    Attributes:
        path: The file.
        layers: In the order of the model, then what was not used of the file.
    """

    path: str
    layers: tuple[LayerReport, ...]

    def names(self, *states: str) -> tuple[str, ...]:
        """The layers in these states."""
        return tuple(entry.layer for entry in self.layers if entry.state in states)

    def num_parameters(self, *states: str) -> int:
        """Numbers in the weights of the layers in these states."""
        return sum(entry.num_parameters for entry in self.layers if entry.state in states)

    @property
    def loaded_share(self) -> float:
        """Share of the model's parameters that came from the file, in 0..1."""
        whole = self.num_parameters("matched", "renamed", "differs", "missing")
        return self.num_parameters("matched", "renamed") / whole if whole else 1.0

    @property
    def complete(self) -> bool:
        """Whether every weight of the model came from the file."""
        return not self.names("differs", "missing")

    def to_dict(self) -> dict[str, Any]:
        """For run.json: counts by state, the share, and every layer that was not simply matched as it is."""
        return {
            "path": self.path,
            "counts": {state: len(self.names(state)) for state in STATES},
            "loaded_share": self.loaded_share,
            "layers": [dataclasses.asdict(entry) for entry in self.layers if entry.detail or entry.state != "matched"],
        }

    def __str__(self) -> str:
        """
        Example:
            >>> layers = (LayerReport("conv", "matched", 90), LayerReport("out", "differs", 10, "(9, 5) in the file"))
            >>> print(LoadReport("x.h5", layers))
            x.h5: 90 of 100 parameters (90.0 %) loaded: 1 layer matched, 1 differs
              differs: out: (9, 5) in the file
        """
        counts = [(state, len(self.names(state))) for state in STATES]
        told = ", ".join(_counted(state, count, first=state == "matched") for state, count in counts if count)
        whole = self.num_parameters("matched", "renamed", "differs", "missing")
        lines = [
            f"{self.path}: {self.num_parameters('matched', 'renamed')} of {whole} parameters "
            f"({_percent(self.loaded_share)}) loaded: {told or 'nothing'}"
        ]
        for state in STATES:
            entries = [entry for entry in self.layers if entry.state == state and (entry.detail or state != "matched")]
            lines += [f"  {state}: {_told(entry)}" for entry in entries[:12]]
            lines += [f"  {state}: and {len(entries) - 12} more"] if len(entries) > 12 else []
        return "\n".join(lines)


def joined(reports: Sequence["LoadReport"]) -> "LoadReport":
    """One report of several files."""
    return LoadReport(
        ", ".join(report.path for report in reports), tuple(entry for report in reports for entry in report.layers)
    )


def check_fit(report: LoadReport, network: str, *, partial: bool) -> None:
    """Refuse weights that do not fit, before any is set.

    Args:
        report: What would be loaded.
        network: The name of the model.
        partial: Whether a part is enough.

    Raises:
        InputError: Where nothing fits, or not everything does and `partial` is not given; or less than two hundredths
            of the parameters fit and none of them by the name of their layer.

    Example:
        >>> rows = (LayerReport("conv", "missing", 90), LayerReport("stem", "unused", 30))
        >>> try:
        ...     check_fit(LoadReport("x.h5", rows), "net", partial=True)
        ... except InputError as error:
        ...     print(str(error)[:62])
        Nothing in x.h5 fits the network 'net', and nothing was loaded
    """
    fitting, wanted = report.names("matched", "renamed"), report.names("matched", "renamed", "differs", "missing")
    if not wanted or report.complete:
        return
    by_chance = report.loaded_share < CHANCE_SHARE
    if partial and fitting and (report.names("matched") or not by_chance):
        return
    if not fitting or by_chance:
        lacking = [_told(entry) for entry in report.layers if entry.state in ("missing", "differs")]
        spare = ", ".join(report.names("unused")[:3])
        told = (
            f"Nothing in {report.path} fits the network {network!r}, and nothing was loaded"
            if not fitting
            else f"{report.path} does not fit the network {network!r}: {len(fitting)} of {len(wanted)} layers "
            f"({_percent(report.loaded_share)} of the parameters) do"
        )
        raise InputError(
            f"{told}: it holds the weights of another network. The network wants {'; '.join(lacking[:3])}"
            f"{f'; the file has {spare}' if spare else ''}. Give the file of this network, or name the network that "
            "the file belongs to as the source."
        )
    raise InputError(
        f"{report.path} does not fit the network {network!r} whole; give --partial (partial=True) to load what fits.\n"
        f"{report}"
    )


def _percent(share: float) -> str:
    return "under 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def _counted(state: str, count: int, *, first: bool) -> str:
    return f"{count} layer{'s' * (count != 1)} {state}" if first else f"{count} {state}"


def _told(entry: LayerReport) -> str:
    return f"{entry.layer}: {entry.detail}" if entry.detail else entry.layer

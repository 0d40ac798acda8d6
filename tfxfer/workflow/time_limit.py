"""What a run under a time limit keeps back for what follows training, and what it leaves out where time is short."""

import dataclasses
from typing import Any

from tfxfer.runtime.progress import Progress
from tfxfer.train.clock import Clock

ENDING_SECONDS = 1.5  # the bootstrap of the verdict, the last files, the end of the process
PIXEL_SECONDS = 0.001  # an image, of both classifiers on pixels


@dataclasses.dataclass(frozen=True)
class Speed:
    """How quick a network is here, and what follows from that.

    The factors are those of processor time, measured on two cores with digits_cnn at 32 px, mobilenet_v2 at 128 px and
    efficientnet_lite0 at 224 px. Exporting runs in two processes, so wall time is 0.6 of it.

    Attributes:
        graph_seconds: What tracing it as a graph with constant weights took.
        images_per_second: Of that graph.

    Example:
        >>> speed = Speed(graph_seconds=1.0, images_per_second=200.0)
        >>> round(speed.predict_seconds(300), 1), round(speed.export_seconds(2, 300), 1), speed.export_seconds(0, 300)
        (3.3, 11.5, 0.0)
    """

    graph_seconds: float
    images_per_second: float

    def predict_seconds(self, num_images: int) -> float:
        """Of Keras' `predict`, which is traced anew and folds nothing."""
        return 1.3 * self.graph_seconds + num_images / (0.75 * self.images_per_second)

    def export_seconds(self, num_formats: int, num_test: int) -> float:
        """Of exporting, reopening each artifact in a process of its own, and predicting the test part there."""
        if not num_formats:
            return 0.0
        both = 2.3 + 6.1 * self.graph_seconds + 2.1 * num_test / self.images_per_second
        return both * (0.25 + 0.375 * num_formats)

    def features_seconds(self, num_images: int) -> float:
        """Of tracing another graph of the same network, and running it."""
        return self.graph_seconds + num_images / self.images_per_second

    def epoch_seconds(self, num_images: int) -> float:
        """Of compiling a training step of all weights, and one epoch of it."""
        return 6.0 * self.graph_seconds + 4.0 * num_images / self.images_per_second


class TimeLimit:
    """The clock of a run, and what its limit costs.

    Args:
        seconds: From `started`; 0 for none.
        started: `time.monotonic()` of the beginning; now by default.
        progress: Told what is left out.

    Attributes:
        clock: Of the training at work.
        kept_back: Every figure that was predicted for what follows training.
        left_out: What the limit did not allow, and why.
    """

    def __init__(self, seconds: float = 0.0, started: float | None = None, progress: Progress | None = None):
        self.clock = Clock(seconds, started)
        self.progress = progress or Progress()
        self.kept_back: dict[str, float] = {}
        self.left_out: dict[str, str] = {}

    @property
    def given(self) -> bool:
        """Whether there is a limit."""
        return self.clock.limited

    def again(self) -> None:
        """For another training under the same limit."""
        self.clock = self.clock.again()

    def keep_back(self, what: str, seconds: float) -> None:
        """Keep seconds for later."""
        self.clock.keep_back(what, seconds)
        self.kept_back[what] = round(self.clock.kept_back[what], 2)

    def release(self, *names: str) -> None:
        """It is done, or at work now."""
        for name in names:
            self.clock.release(name)

    def fits(self, what: str, seconds: float) -> bool:
        """Whether something of so many seconds fits into what is left; what does not is left out by its name."""
        left = self.clock.remaining()
        if left > seconds:
            return True
        self.left_out[what] = f"it takes about {seconds:.1f} s, and {max(left, 0.0):.1f} s are left"
        self.progress.note(f"left out: {what}, {self.left_out[what]}")
        return False

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "seconds": self.clock.limit_seconds,
            "left": round(self.clock.left(), 2),
            "kept_back": self.kept_back,
            "left_out": self.left_out,
        }


def other_seeds_seconds(seconds: float, count: int, seed_seconds: float) -> float:
    """What of the time that is left the other seeds get: each what it needs, and all share the rest alike.

    Args:
        seconds: Left.
        count: Seeds that are still to come.
        seed_seconds: What one of them takes without fine-tuning.

    Example:
        >>> other_seeds_seconds(100.0, 2, 5.0)  # 90 s are left for three to fine-tune in
        70.0
        >>> round(other_seeds_seconds(12.0, 4, 5.0), 2)  # two more, that have next to nothing to fine-tune in
        11.33
    """
    count = min(count, int(max(seconds, 0.0) // seed_seconds))
    rest = max(seconds, 0.0) - count * seed_seconds
    return count * (seed_seconds + rest / (count + 1))

"""What is frozen is computed, a view of all images at a time: decided, journaled and noted."""

from tfxfer.features.engines import Engines
from tfxfer.features.extract import Extracted
from tfxfer.features.reuse import Decision, Features
from tfxfer.features.views import View, view_name
from tfxfer.runtime.progress import Progress
from tfxfer.train.clock import Clock
from tfxfer.train.journal import Journal
from tfxfer.train.outcome import Outcome, TrainingData


class FrozenViews:
    """Computes views of the frozen part.

    Args:
        data: Images.
        clock, progress, journal: As `run_stages` takes them.
        outcome: Decisions, rates and seconds are written into it.
    """

    def __init__(self, data: TrainingData, clock: Clock, progress: Progress, journal: Journal, outcome: Outcome):
        self.data, self.clock, self.progress, self.journal, self.outcome = data, clock, progress, journal, outcome
        self._num_extracted = 0

    def look(self, engines: Engines, view: View, num_views: int, what: str = "") -> tuple[Features, Decision, str]:
        """What computing a view takes, before it is computed."""
        name = view_name(view)
        told = f"{name}, {what}" if what else name
        self.progress.phase(f"frozen features, {told}", len(self.data.labels))
        with self.outcome.timed("features"):
            features = Features(engines, self.data.parts, view, num_views=num_views)
            self._num_extracted += 1
            _, facts = self.journal.memo(
                f"how features are computed, {self._num_extracted}, {name}", lambda: ({}, features.decide().to_dict())
            )
        decision = Decision.from_dict(facts)
        self.outcome.graph_seconds = max(self.outcome.graph_seconds, engines.graph.build_seconds)
        self.outcome.images_per_second = decision.engine.tensorflow_images_per_second
        if self.clock.limited and decision.used == "found":  # that was measured by another run, at another time
            self.outcome.images_per_second = engines.graph_speed(self.data.parts)
        return features, decision, told

    def compute(self, features: Features, decision: Decision, told: str) -> Extracted:
        """Compute a view as it was decided, or find it, and note what it took."""
        with self.outcome.timed("features"):
            found, decision = features.compute(decision, on_progress=self.progress.update)
        self.outcome.cache.update(
            images=len(self.data.labels),
            views=self.outcome.cache.get("views", 0) + 1,
            activation_shapes=[list(shape) for shape in found.activations.shapes],
            bytes=self.outcome.cache.get("bytes", 0) + found.activations.nbytes,
            images_per_second=round(found.images_per_second, 1),
            disk={**self.outcome.cache.get("disk", {}), told: decision.to_dict()},
        )
        return found

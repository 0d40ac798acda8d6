"""Which views of the images training sees beside the plain ones, and whether they are kept or made anew."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfxfer.features.crossing import crossing_of
from tfxfer.features.cut import Cut
from tfxfer.features.engines import Engines
from tfxfer.features.extract import Extracted
from tfxfer.features.fresh import FreshViews, ViewsDecision, decide_views, features_of
from tfxfer.features.reuse import Features
from tfxfer.features.views import RandView
from tfxfer.methods.probe import Probe
from tfxfer.runtime.store import Rows
from tfxfer.specs import Plan, Stage
from tfxfer.train.journal import Journal
from tfxfer.train.lengths import epochs_of


def num_views(plan: Plan, stages: Sequence[Stage], depth: int) -> int:
    """Views of each image that are likely to be computed: what a quicker engine has to pay for.

    Args:
        plan: Its augmentation.
        stages: That fine-tune; without them nothing is augmented.
        depth: Of the shallowest of them; at 0 views are not kept.
    """
    if plan.augment == "none" or not stages:
        return 1
    if plan.augment == "rand":
        return plan.views if depth else 1
    return 2


def loss_rise(probe: Probe, before: Probe) -> dict[str, float]:
    """How the held-out log loss of a probe differs from another's on the same images, and how sure that is."""
    rise = probe.held_log_losses - before.held_log_losses
    error = float(rise.std(ddof=1) / len(rise) ** 0.5)
    return {"log_loss_rise": float(np.mean(rise)), "standard_error": error}


class RandViews:
    """The views of `augment = "rand"`: a few that are kept, or new ones whenever training asks.

    Args:
        plan: Seed, number of views, batch size.
        stages: That train on them.
        splits: Pairs (train rows, held-out rows): each stage trains once on each, its rates not counted.
        cut, engines: What is frozen.
        parts: (n, S, S, 3) uint8 arrays, or rows in files.
        plain: Of the plain images.
    """

    def __init__(
        self, plan: Plan, stages: Sequence[Stage], splits: Sequence[tuple[np.ndarray, np.ndarray]], cut: Cut,
        engines: Engines, parts: Sequence[Rows], plain: Extracted,
    ):  # fmt: skip
        self.plan, self.cut, self.engines, self.parts, self.plain = plan, cut, engines, parts, plain
        # Of a stage's rates two are tried at least; runs that stop early and the refit are not counted.
        num_images, size = len(splits[0][0]), plan.batch_size
        self.passes = sum(
            epochs_of(stage, num_images, size) * (len(splits) + (len(stage.learning_rates) > 1)) for stage in stages
        )
        self.kept = [RandView(plan.seed, number) for number in range(1, plan.views)]

    def decide(self, journal: Journal) -> ViewsDecision:
        """Whether they are kept; measured, or as it was measured before."""

        def measure() -> tuple[dict, dict[str, Any]]:
            if self.cut.depth == 0:
                return {}, ViewsDecision("fresh", 0, "Nothing is frozen, so each epoch has new views.").to_dict()
            return {}, self._measured().to_dict()

        return ViewsDecision.from_dict(journal.memo("how views are made", measure)[1])

    def _measured(self) -> ViewsDecision:
        of_each = [Features(self.engines, self.parts, view) for view in self.kept]
        missing = [features for features in of_each if features.find() is None]
        view_seconds, disk_seconds = of_each[0].costs()
        fresh_seconds = self._crossing().seconds_an_image(self.plan.batch_size) * sum(map(len, self.parts))
        return decide_views(
            self.plan.views, len(missing), self.passes,
            view_seconds=view_seconds, disk_seconds=disk_seconds, fresh_seconds=fresh_seconds,
        )  # fmt: skip

    def fresh(self) -> Extracted:
        """The plain view, and new ones without end."""
        features = self.plain.features.as_activations()
        return dataclasses.replace(
            self.plain,
            activations=self._crossing(),
            fresh_features=FreshViews(features_of(self.engines.graph), self.parts, features, self.plan.seed),
            views=(*self.plain.views, "rand"),
        )

    def _crossing(self) -> FreshViews:
        return FreshViews(crossing_of(self.cut), self.parts, self.plain.activations, self.plan.seed)

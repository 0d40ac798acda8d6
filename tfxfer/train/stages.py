"""The stage loop: probe, fine-tune from it, keep what held-out images say is better, refit on everything."""

from collections.abc import Callable, Sequence

import keras
import numpy as np

from tfxfer.errors import InputError
from tfxfer.features.cut import Cut, cut_model
from tfxfer.features.extract import Extracted, FrozenPrefix, join_views
from tfxfer.features.reuse import extract_once
from tfxfer.features.solvers import log_softmax, moving_features
from tfxfer.methods.probe import Probe, fit_probe, make_folds
from tfxfer.model.blocks import list_blocks
from tfxfer.model.freeze import (
    Depth,
    adapt_batch_norm,
    audit_frozen,
    digest_backbone,
    digest_frozen,
    freeze,
    leading_blocks,
)
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Stage
from tfxfer.train.clock import Clock
from tfxfer.train.journal import Journal
from tfxfer.train.outcome import Outcome, TrainingData
from tfxfer.train.tuning import Tuner

CROSS_FIT_IMAGES = 300
TUNING_FOLDS = 3  # each costs a whole fine-tuning; the probe's five cost nothing


def run_stages(
    model: keras.Model,
    plan: Plan,
    stages: Sequence[Stage],
    data: TrainingData,
    *,
    auto_depth: Depth,
    clock: Clock | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    on_model: Callable[[str], None] = lambda stage: None,
    journal: Journal | None = None,
) -> Outcome:
    """Train a model of `build_model` by the stages of a recipe, in place.

    Args:
        model: Its head is overwritten; what the last stage freezes stays frozen in it.
        plan: Batch size, metric, augmentation, seed.
        stages: A convex one first or none, then any number of others.
        data: Images, labels, parts.
        auto_depth: What freeze depth "auto" means here.
        clock: The time limit.
        progress: Told about phases.
        callbacks: The user's Keras callbacks; they see one run of epochs, numbered through.
        on_model: Called with a stage's name whenever the model holds something better than before.
        journal: Where finished runs and the open one are kept, so that another process can go on from there.

    Returns:
        The outcome.
    """
    loop = _Loop(
        model, plan, tuple(stages), data, auto_depth, clock or Clock(), progress or Progress(), tuple(callbacks)
    )
    loop.on_model = on_model
    loop.journal = journal or Journal()
    return loop.run()


class _Loop:
    def __init__(self, model, plan, stages, data, auto_depth, clock, progress, callbacks):
        self.model, self.plan, self.data = model, plan, data
        self.clock, self.progress, self.callbacks = clock, progress, callbacks
        self.on_model: Callable[[str], None] = lambda stage: None
        self.journal = Journal()
        self.convex = next((stage for stage in stages if stage.solver == "convex"), None)
        self.tuned = tuple(stage for stage in stages if stage.solver != "convex")
        self.freezing = [auto_depth if s.freeze_depth == "auto" else s.freeze_depth for s in self.tuned]
        self.depths = [leading_blocks(model, depth) for depth in self.freezing]
        self.num_blocks = len(list_blocks(model))
        self.depth = min(self.depths, default=self.num_blocks)
        self.outcome = Outcome()
        self.probe: Probe | None = None

    # -- phases ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        cut = self._cut()
        with self.outcome.timed("prepare_features"):
            prefix = FrozenPrefix(cut)
        extracted = self._extract(prefix, "plain")
        if self._batch_norm() == "adapt":  # before the probe, which is fitted to what the adapted layers compute
            adapt_batch_norm(cut.suffix, extracted.activations[0][self.data.rows])
            prefix = FrozenPrefix(cut)
            extracted = self._extract(prefix, "plain")
        self._features = extracted.features[0]
        if not moving_features(self._features).any():
            raise InputError(
                f"The source {self.plan.source!r} gives the same features for every image, up to rounding, so there is "
                "nothing to transfer: its weights or BatchNorm statistics are damaged, or it wants pixels in another "
                "range (--input-range)."
            )
        before, whole = digest_frozen(self.model), digest_backbone(self.model)
        if self.convex:
            self.probe = self._fit_probe(extracted)
            head = self.probe.head(self.data.all_rows)
            self.model.get_layer("logits").set_weights([head.kernel, head.bias])
            self._judge_probe()
            self.on_model("probe")
        if self.tuned and not self.clock.expired():
            try:
                extracted = self._with_mirror(prefix, extracted)
                Tuner(
                    self.model, cut, extracted, self.data, self.plan, self.tuned, self.freezing, self.probe,
                    self._splits(), self.outcome, clock=self.clock, progress=self.progress, callbacks=self.callbacks,
                    on_model=self.on_model, journal=self.journal,
                ).tune()  # fmt: skip
            except KeyboardInterrupt:
                self.outcome.interrupted = True
        self.outcome.out_of_time = self.clock.expired()
        depth = self.num_blocks if self.outcome.chosen == "probe" else self.depth
        self.outcome.audit = {
            "freeze_depth": depth,
            "num_blocks": self.num_blocks,
            "freezing": "all" if self.outcome.chosen == "probe" else [str(depth) for depth in self.freezing],
            "frozen_blocks": [block.name for block in list_blocks(self.model)[:depth]],
            "batch_norm": self._batch_norm(),
            **audit_frozen(self.model, whole if self.outcome.chosen == "probe" else before),
        }
        return self.outcome

    def _cut(self) -> Cut:
        """Cut at the shallowest stage, or shallower still where more than one tensor crosses."""
        # Of several stages only the leading blocks that all of them freeze are sure to stay.
        kept = self.freezing[0] if len(self.freezing) == 1 else self.depth
        freeze(self.model, kept, batch_norm=self._batch_norm())
        for depth in range(self.depth, -1, -1):
            cut = cut_model(self.model, depth)
            if cut is not None:
                return cut
        raise AssertionError("a cut before the first block crosses the input alone")

    def _batch_norm(self) -> str:
        states = {stage.batch_norm for stage in self.tuned}
        return states.pop() if len(states) == 1 else "train" if states else "frozen"

    def _extract(self, prefix: FrozenPrefix, view: str) -> Extracted:
        self.progress.phase(f"frozen features, {view}", len(self.data.labels))
        with self.outcome.timed("features"):
            found, decision = extract_once(prefix, self.data.parts, view, on_progress=self.progress.update)
        self.outcome.cache.update(
            images=len(self.data.labels),
            views=self.outcome.cache.get("views", 0) + 1,
            activation_shape=list(found.activations.shape[2:]),
            bytes=self.outcome.cache.get("bytes", 0) + found.activations.nbytes,
            images_per_second=round(found.images_per_second, 1),
            disk={**self.outcome.cache.get("disk", {}), view: decision.to_dict()},
        )
        return found

    def _fit_probe(self, extracted: Extracted) -> Probe:
        self.progress.phase("probe")
        data = self.data
        rows, held = (data.all_rows, data.held[:0]) if self._pools() else (data.rows, data.held)
        with self.outcome.timed("probe"):
            return fit_probe(
                extracted.features, data.labels, data.weights, data.groups, rows, held, data.num_classes,
                seed=self.plan.seed, memo=self.journal.memo,
            )  # fmt: skip

    def _pools(self) -> bool:
        return self.data.may_pool and len(self.data.labels) <= CROSS_FIT_IMAGES

    def _splits(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Where fine-tuning is judged: the validation part, or folds of everything where images are few."""
        data = self.data
        if not self._pools():
            return [(data.rows, data.held)]
        return make_folds(
            data.labels, data.groups, data.all_rows, data.held[:0], seed=self.plan.seed, num_folds=TUNING_FOLDS
        )[0]

    def _judge_probe(self) -> None:
        """Held-out probabilities of the probe on what fine-tuning is judged on."""
        assert self.probe
        splits = self._splits()
        features = self._features
        scores = [log_softmax(self.probe.head(rows).logits(features[held])) for rows, held in splits]
        self.outcome.held = np.concatenate([held for _, held in splits])
        self.outcome.held_probabilities = np.exp(np.concatenate(scores))
        self.outcome.selection["probe"] = {
            "strength": self.probe.strength,
            "chosen_by": self.probe.chosen_by,
            "log_loss": self.probe.log_loss,
            "temperature": self.probe.temperature,
            "judged_on": "validation part" if len(splits) == 1 else f"{len(splits)} folds",
        }

    def _with_mirror(self, prefix: FrozenPrefix, extracted: Extracted) -> Extracted:
        """Add mirrored views unless the probe, judged on plain images, gets worse by training on them."""
        if self.plan.augment == "none":
            return extracted
        both = join_views(extracted, self._extract(prefix, "mirror"))
        if self.probe:
            mirrored = self._fit_probe(both)
            rise = mirrored.held_log_losses - self.probe.held_log_losses
            error = float(rise.std(ddof=1) / len(rise) ** 0.5)
            used = self.plan.augment == "mirror" or bool(rise.mean() <= error)
            self.outcome.selection["mirror"] = {
                "log_loss_rise": float(rise.mean()),
                "standard_error": error,
                "used": used,
            }
            if not used:
                return extracted
            self.probe = mirrored
            self._judge_probe()
        return both

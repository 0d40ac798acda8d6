"""The stage loop: probe, fine-tune from it, keep what held-out images say is better, refit on everything."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np

from tfxfer.errors import InputError
from tfxfer.features.cut import Cut, cut_model
from tfxfer.features.engines import Engines
from tfxfer.features.extract import Extracted, FrozenPrefix, join_views
from tfxfer.features.reuse import Decision, Features
from tfxfer.features.rows import ViewFeatures
from tfxfer.features.solvers import log_softmax, moving_features
from tfxfer.features.views import RandView, View
from tfxfer.methods.probe import Probe, fit_probe, judged_on, make_folds
from tfxfer.model.blocks import list_blocks
from tfxfer.model.freeze import Depth, audit_frozen, digest_backbone, digest_frozen
from tfxfer.model.taps import Tapped
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Stage
from tfxfer.train.augmentation import RandViews, loss_rise, num_views
from tfxfer.train.auto import TABLE, asked_of, shift_of, size_of, told, tuning_stage
from tfxfer.train.bit import bit_stage
from tfxfer.train.clock import Clock
from tfxfer.train.distribute import Devices
from tfxfer.train.forgetting import SourceHead, refuse_regularizer
from tfxfer.train.freezing import Freezing
from tfxfer.train.journal import Journal
from tfxfer.train.outcome import Outcome, TrainingData
from tfxfer.train.precision import check_precision
from tfxfer.train.recipes import get_recipe
from tfxfer.train.several_blocks import gain_of, tapped_for, with_head
from tfxfer.train.tuning import Tuner
from tfxfer.train.views import FrozenViews

CROSS_FIT_IMAGES = 300
TUNING_FOLDS = 3  # each costs a whole fine-tuning; the probe's five cost nothing
# What a pass over all images may take of the time that is left: to solve a head on several blocks takes as long again
# and longer, and the pass that fine-tuning needs is still to come.
WIDE_SHARE, MIRROR_SHARE = 0.05, 0.2


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
    on_model: Callable[[str, keras.Model], None] = lambda stage, model: None,
    before_tuning: Callable[[Outcome], None] = lambda outcome: None,
    journal: Journal | None = None,
    source_head: SourceHead | None = None,
    devices: Devices | None = None,
) -> Outcome:
    """Train a model of `build_model` by the stages of a recipe.

    Args:
        model: Trained in place; its head is overwritten, and what the last stage freezes stays frozen in it. Where a
            probe on several blocks is kept, `outcome.model` is another one around the same layers.
        plan: Batch size, metric, augmentation, seed.
        stages: A convex one first or none, then any number of others.
        data: Images, labels, parts.
        auto_depth: What freeze depth "auto" means here.
        clock: The time limit.
        progress: Told about phases.
        callbacks: The user's Keras callbacks; they see one run of epochs, numbered through.
        on_model: Called with a stage's name and the best model whenever that is better than before.
        before_tuning: Called once the probe is there; what it keeps back of the clock is not planned with.
        journal: Where finished runs and the open one are kept, so that another process can go on from there.
        source_head: The source's own output on its features, for stages that take part in it.
        devices: What takes the training steps; one device by default.

    Returns:
        The outcome.
    """
    loop = _Loop(
        model, plan, tuple(stages), data, auto_depth, clock or Clock(), progress or Progress(), tuple(callbacks)
    )
    loop.on_model, loop.before_tuning = on_model, before_tuning
    loop.journal = journal or Journal()
    loop.source_head = source_head
    loop.devices = devices or Devices()
    return loop.run()


class _Loop:
    def __init__(self, model, plan, stages, data, auto_depth, clock, progress, callbacks):
        self.model, self.plan, self.data = model, plan, data
        self.clock, self.progress, self.callbacks = clock, progress, callbacks
        self.on_model: Callable[[str, keras.Model], None] = lambda stage, model: None
        self.before_tuning: Callable[[Outcome], None] = lambda outcome: None
        self.journal = Journal()
        self.source_head: SourceHead | None = None
        check_precision(plan.precision, model)
        self.devices = Devices()
        self.auto_depth, self.num_blocks = auto_depth, len(list_blocks(model))
        self.outcome = Outcome()
        if plan.recipe.by_size:
            stages = [stage if stage.is_probe else bit_stage(stage, len(data.rows)) for stage in stages]
            self.outcome.selection["by_size"] = {
                stage.name: {"images": len(data.rows), "steps": stage.steps, "mixup": stage.mixup}
                for stage in stages
                if not stage.is_probe
            }
        self._set_stages(stages)
        self.solvers: tuple[str, ...] = (self.convex.solver,) if self.convex else ()
        self.features = plan.features
        self.probe: Probe | None = None
        self.tapped: Tapped | None = None
        self.multi: Probe | None = None
        self.probed: keras.Model = model  # what holds the best probe

    # -- phases ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        self.views = FrozenViews(self.data, self.clock, self.progress, self.journal, self.outcome)
        self._read_blocks()
        if self.plan.recipe.by_table and self.convex and self.tuned and self.data.anchor is None:
            self._look_up()
        cut = self.freezing.cut()
        if self.tapped is not None and not self.tuned:
            features = self._last_of_wide()  # nothing but these is wanted
        else:
            engines, extracted = self._plain(cut)
            features = extracted.features
        self._features = features[0]
        if not moving_features(self._features).any():
            raise InputError(
                f"The source {self.plan.source!r} gives the same features for every image, up to rounding, so there is "
                "nothing to transfer: its weights or BatchNorm statistics are damaged, or it wants pixels in another "
                "range (--input-range)."
            )
        before, whole = digest_frozen(self.model), digest_backbone(self.model)
        if self.convex:
            probes = [self._fit_probe(features, solver) for solver in self.solvers]
            self.probe = min(probes, key=lambda probe: probe.log_loss)
            head = self.probe.head(self.data.all_rows)
            self.model.get_layer("logits").set_weights([head.kernel, head.bias])
            self._judge_probe()
            self.on_model("probe", self.probed)
        try:
            self.before_tuning(self.outcome)
            if self.tuned and self.clock.expired():
                self.outcome.left_out |= {stage.name: "the time was over before it began" for stage in self.tuned}
            elif self.tuned:
                extracted = self._with_views(cut, engines, extracted)
                Tuner(
                    self.model, cut, extracted, self.data, self.plan, self.tuned, self.freezing.depths, self.probe,
                    self._splits(), self.outcome, clock=self.clock, progress=self.progress, callbacks=self.callbacks,
                    on_model=lambda stage: self.on_model(stage, self.model), journal=self.journal,
                    source_head=self.source_head,
                    devices=self.devices,
                ).tune()  # fmt: skip
        except KeyboardInterrupt:
            self.outcome.interrupted = True
        self.outcome.out_of_time = self.clock.expired() or bool(self.outcome.left_out)
        self.outcome.model = self.probed if self.outcome.chosen == "probe" else self.model
        depth = self.num_blocks if self.outcome.chosen == "probe" else self.freezing.num_leading
        self.outcome.audit = {
            "freeze_depth": depth,
            "num_blocks": self.num_blocks,
            "freezing": "all" if self.outcome.chosen == "probe" else [str(depth) for depth in self.freezing.depths],
            "frozen_blocks": [block.name for block in list_blocks(self.model)[:depth]],
            "batch_norm": self.freezing.batch_norm,
            **audit_frozen(self.model, whole if self.outcome.chosen == "probe" else before),
        }
        return self.outcome

    def _set_stages(self, stages: Sequence[Stage]) -> None:
        self.convex = next((stage for stage in stages if stage.is_probe), None)
        self.tuned = tuple(
            dataclasses.replace(stage, batch_norm="frozen") if stage.batch_norm == "auto" else stage
            for stage in stages
            if not stage.is_probe
        )
        self.freezing = Freezing(self.model, self.tuned, self.auto_depth)
        for stage, depth in zip(self.tuned, self.freezing.depths, strict=True):
            if not (self.plan.recipe.by_table and stage.freeze_depth == "auto"):  # the table may say another depth
                refuse_regularizer(stage, self.model, depth)

    def _look_up(self) -> None:
        """The stages that the table of recipe "auto" has for such data."""
        data = self.data

        def measure():
            size, count = size_of(data.labels)
            facts = {"size": size, "labels_a_class": count, "shift": "near", "why": "not measured"}
            if self.tapped is not None:
                last = self._fit_probe(self._last_of_wide(), "convex")
                found = gain_of(self._fit_blocks(last), last, data.groups)
                facts |= shift_of(found, data.labels, data.weights) | {"why": "measured"}
            return {}, facts

        _, facts = self.journal.memo("rule of auto", measure)
        rule = TABLE[facts["size"], facts["shift"]]
        convex, (stage,) = self.convex, self.tuned
        assert convex is not None  # a recipe by the table has both
        asked = asked_of(self.plan.recipe.stages, get_recipe("auto").stages)
        tune = tuning_stage(rule, asked, stage, wanted=bool(self.callbacks))
        self._set_stages((convex,) if tune is None else (convex, tune))
        if self.features == "auto" and self.tapped is not None:
            self.features = rule.features
        if convex.solver == "convex" and self.features != "multi":
            self.solvers = rule.probes
        sentence = told(facts, rule, asked)
        self.outcome.selection["auto"] = {**facts, "asked": list(asked), "rule": sentence}
        self.progress.note(sentence)

    def _fit_blocks(self, last: Probe) -> Probe:
        assert self.tapped is not None
        near = last.choice["strength"] if last.solver == "convex" else None
        return self._fit_probe(self._wide, "blocks", num_last=self.tapped.widths[-1], near=near)

    def _plain(self, cut: Cut) -> tuple[Engines, Extracted]:
        with self.outcome.timed("prepare_features"):
            engines = Engines(FrozenPrefix(cut), copies=self.devices.engines)
        extracted = self._extract(engines, "plain")
        if self.freezing.adapting:  # before the probe, which is fitted to what the adapted layers compute
            self.freezing.adapt(cut, extracted, self.data.rows)
            engines = Engines(FrozenPrefix(cut), copies=self.devices.engines)
            extracted = self._extract(engines, "plain")
        return engines, extracted

    def _extract(self, engines: Engines, view: View, what: str = "") -> Extracted:
        return self.views.compute(*self._look(engines, view, what))

    def _look(self, engines: Engines, view: View, what: str = "") -> tuple[Features, Decision, str]:
        return self.views.look(engines, view, num_views(self.plan, self.tuned, self.freezing.num_leading), what)

    def _last_of_wide(self) -> ViewFeatures:
        assert self.tapped is not None
        width = self._wide.shape[-1]
        return self._wide.picked(columns=np.arange(width - self.tapped.widths[-1], width))

    def _fit_probe(self, features: ViewFeatures, solver: str, **options) -> Probe:
        self.progress.phase("probe on several blocks" if solver == "blocks" else "probe")
        data = self.data
        rows, held = (data.all_rows, data.held[:0]) if self._pools() else (data.rows, data.held)
        with self.outcome.timed("probe_on_blocks" if solver == "blocks" else "probe"):
            return fit_probe(
                features, data.labels, data.weights, data.groups, rows, held, data.num_classes,
                seed=self.plan.seed, memo=self.journal.memo, anchor=data.anchor,
                judged=None if data.seen is None else np.union1d(data.judged(rows), data.judged(held)),
                solver=solver, options=options,
            )  # fmt: skip

    def _pools(self) -> bool:
        return self.data.may_pool and len(self.data.labels) <= CROSS_FIT_IMAGES

    def _splits(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Where fine-tuning is judged: the validation part, or folds of everything where images are few."""
        data = self.data
        if not self._pools():
            return [(data.rows, data.judged(data.held))]
        pairs, _ = make_folds(
            data.labels, data.groups, data.all_rows, data.held[:0], seed=self.plan.seed, num_folds=TUNING_FOLDS
        )
        return judged_on(pairs, data.judged(data.all_rows))

    def _read_blocks(self) -> None:
        """Features of several blocks, where a probe on them is asked for or may be better."""
        self.tapped = tapped_for(self.model, self.plan, self.convex, bool(self.freezing.adapting), self.data)
        if self.tapped is None:
            return
        cut = cut_model(self.tapped.model, self.num_blocks)
        assert cut is not None  # behind the last block the features alone are left
        with self.outcome.timed("prepare_features"):
            engines = Engines(FrozenPrefix(cut), copies=self.devices.engines)
        looked = self._look(engines, "plain", "several blocks")
        what = "the probe on several blocks"
        if self.features == "auto" and not self._fits(what, looked[1].compute_seconds, WIDE_SHARE):
            self.tapped = None
            return
        self._wide = self.views.compute(*looked).features

    def _fits(self, what: str, seconds: float, share: float) -> bool:
        """Whether a pass over all images takes no more than its share of the time left; else it is left out by name."""
        left = self.clock.remaining()
        if seconds <= share * left:
            return True
        why = f"its features take about {seconds:.1f} s, and {max(left, 0.0):.1f} s are left"
        self.outcome.left_out[what] = why
        self.progress.note(f"left out: {what}, {why}")
        return False

    def _judge_probe(self) -> None:
        """Held-out probabilities of the probe on what fine-tuning is judged on."""
        assert self.probe
        splits = self._splits()
        self.probed, judged, features = self.model, self.probe, self._features
        if self.tapped is not None:
            self.multi = self.multi or self._fit_blocks(self.probe)
            found = gain_of(self.multi, self.probe, self.data.groups)
            used = self.features == "multi" or found["gain"] > found["standard_error"]
            facts: dict = {"used": "multi" if used else "last", **found}
            if used:
                judged, features = self.multi, self._wide[0]
                self.probed, told = with_head(self.model, self.tapped, self.multi, self.data.all_rows)
                facts |= told
            self.outcome.selection["features"] = facts
        scores = [log_softmax(judged.head(rows).logits_of(features, held)) for rows, held in splits]
        self.outcome.held = np.concatenate([held for _, held in splits])
        self.outcome.held_probabilities = np.exp(np.concatenate(scores))
        self.outcome.selection["probe"] = {
            "solver": judged.solver,
            **judged.choice,
            "chosen_by": judged.chosen_by,
            "training_temperature": judged.temperature,
            "judged_on": "validation part" if len(splits) == 1 else f"{len(splits)} folds",
        }

    def _with_views(self, cut: Cut, engines: Engines, extracted: Extracted) -> Extracted:
        """What is trained on beside the plain images."""
        if self.plan.augment == "none":
            return extracted
        if self.plan.augment == "rand":
            return self._with_rand(cut, engines, extracted)
        return self._with_mirror(engines, extracted)

    def _with_mirror(self, engines: Engines, extracted: Extracted) -> Extracted:
        """Add mirrored views unless the probe, judged on plain images, gets worse by training on them."""
        looked = self._look(engines, "mirror")
        if not self._fits("the mirrored view", looked[1].compute_seconds, MIRROR_SHARE):
            self.outcome.selection["mirror"] = {"used": False}
            return extracted
        both = join_views(extracted, self.views.compute(*looked))
        if self.probe:
            mirrored = self._fit_probe(both.features, self.probe.solver)
            facts = loss_rise(mirrored, self.probe)
            used = self.plan.augment == "mirror" or facts["log_loss_rise"] <= facts["standard_error"]
            self.outcome.selection["mirror"] = {**facts, "used": used}
            if not used:
                return extracted
            self.probe = mirrored
            self._judge_probe()
        return both

    def _with_rand(self, cut: Cut, engines: Engines, extracted: Extracted) -> Extracted:
        """Views by RandAugment, as was asked; the probe takes them where it does not get worse by them."""
        rand = RandViews(self.plan, self.tuned, self._splits(), cut, engines, self.data.parts, extracted)
        with self.outcome.timed("features"):
            decision = rand.decide(self.journal)
        told = self.outcome.selection["rand"] = decision.to_dict()
        if decision.how == "fresh":
            told["probe"] = "plain images only"
            return rand.fresh()
        found = join_views(extracted, *(self._extract(engines, view) for view in self._affordable(rand.kept)))
        told["num_views"] = len(found.views)
        if self.probe:
            augmented = self._fit_probe(found.features, self.probe.solver)
            facts = loss_rise(augmented, self.probe)
            better = facts["log_loss_rise"] <= facts["standard_error"]
            told |= {**facts, "probe": "all views" if better else "plain images only"}
            if better:
                self.probe = augmented
                self._judge_probe()
        return found

    def _affordable(self, views: list[RandView]) -> Iterator[RandView]:
        """The first of them, as long as there is time for one more."""
        for number, view in enumerate(views):
            seconds = len(self.data.labels) / self.outcome.images_per_second if self.clock.limited else 0.0
            if not self._fits(f"{len(views) - number} of {len(views)} augmented views", seconds, MIRROR_SHARE):
                return
            yield view

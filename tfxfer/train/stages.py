"""The stage loop: probe, fine-tune from it, keep what held-out images say is better, refit on everything."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np

from tfxfer.features.cut import Cut, cut_model
from tfxfer.features.extract import Extracted, FrozenPrefix, extract, join_views
from tfxfer.features.solvers import LinearHead, best_temperature
from tfxfer.methods.fine_tune import SuffixTrainer, Trained, interpolate
from tfxfer.methods.probe import Probe, fit_probe, make_folds
from tfxfer.metrics import metric_value, paired_difference
from tfxfer.model.blocks import list_blocks, resolve_depth
from tfxfer.model.freeze import adapt_batch_norm, audit_frozen, digest_frozen, freeze
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan, Stage
from tfxfer.train.clock import Clock, StopOnTime

CROSS_FIT_IMAGES = 300
MIN_STEPS = 150
BLEND_SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """The images that training may see, train and validation part numbered through.

    Attributes:
        parts: (n, S, S, 3) uint8 arrays.
        labels: (N,) int.
        weights: (N,) loss weights, mean about one.
        groups: (N,) names.
        rows, held: Numbers of the train and of the validation images.
        num_classes: K.
        may_pool: Whether the validation part was split off by us, so that few images may be cross-fitted instead.
    """

    parts: tuple[np.ndarray, ...]
    labels: np.ndarray
    weights: np.ndarray
    groups: tuple[str, ...]
    rows: np.ndarray
    held: np.ndarray
    num_classes: int
    may_pool: bool

    @property
    def all_rows(self) -> np.ndarray:
        return np.concatenate([self.rows, self.held])


@dataclasses.dataclass
class Outcome:
    """What training decided and did; the model itself holds the weights.

    Attributes:
        chosen: "probe", "fine_tune" or "blend".
        history: One dict an epoch.
        selection: Every measured choice, for run.json.
        held: Numbers of the images judged while selecting.
        held_probabilities: (n, K) of what was chosen, by models that did not train on them.
        audit: Of the frozen variables.
        cache: What was computed once instead of once an epoch.
        seconds: By phase.
        interrupted, out_of_time: How it ended.
    """

    chosen: str = "probe"
    history: list[dict] = dataclasses.field(default_factory=list)
    selection: dict = dataclasses.field(default_factory=dict)
    held: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    held_probabilities: np.ndarray | None = None
    audit: dict = dataclasses.field(default_factory=dict)
    cache: dict = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    interrupted: bool = False
    out_of_time: bool = False


def run_stages(
    model: keras.Model,
    plan: Plan,
    stages: Sequence[Stage],
    data: TrainingData,
    *,
    auto_depth: int,
    clock: Clock | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    on_model: Callable[[str], None] = lambda stage: None,
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

    Returns:
        The outcome.
    """
    loop = _Loop(
        model, plan, tuple(stages), data, auto_depth, clock or Clock(), progress or Progress(), tuple(callbacks)
    )
    loop.on_model = on_model
    return loop.run()


class _Loop:
    def __init__(self, model, plan, stages, data, auto_depth, clock, progress, callbacks):
        self.model, self.plan, self.data = model, plan, data
        self.clock, self.progress, self.callbacks = clock, progress, callbacks
        self.on_model: Callable[[str], None] = lambda stage: None
        self.convex = next((stage for stage in stages if stage.solver == "convex"), None)
        self.tuned = tuple(stage for stage in stages if stage.solver != "convex")
        blocks = list_blocks(model)
        self.depths = [
            resolve_depth(blocks, auto_depth if s.freeze_depth == "auto" else s.freeze_depth) for s in self.tuned
        ]
        self.num_blocks = len(blocks)
        self.outcome = Outcome()
        self.probe: Probe | None = None
        self._temperature = 1.0

    # -- phases ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        cut = self._cut()
        with self._timed("prepare_features"):
            prefix = FrozenPrefix(cut)
        extracted = self._extract(prefix, "plain")
        self._features = extracted.features[0]
        before = digest_frozen(self.model)
        if self.convex:
            self.probe = self._fit_probe(extracted)
            self._set_head(self.probe.head(self.data.all_rows))
            self._judge_probe()
            self.on_model("probe")
        if self.tuned and not self.clock.expired():
            extracted = self._with_mirror(prefix, extracted)
            before = self._adapt(cut, extracted) or before
            try:
                self._tune(cut, extracted)
            except KeyboardInterrupt:
                self.outcome.interrupted = True
        self.outcome.out_of_time = self.clock.expired()
        self.outcome.audit = {
            "freeze_depth": cut.depth,
            "num_blocks": self.num_blocks,
            "frozen_blocks": [block.name for block in list_blocks(self.model)[: cut.depth]],
            "batch_norm": self._batch_norm(),
            **audit_frozen(self.model, before),
        }
        return self.outcome

    def _cut(self) -> Cut:
        """Cut at the shallowest stage, or shallower still where more than one tensor crosses."""
        wanted = min(self.depths, default=self.num_blocks)
        freeze(self.model, wanted, batch_norm=self._batch_norm())
        for depth in range(wanted, -1, -1):
            cut = cut_model(self.model, depth)
            if cut is not None:
                return cut
        raise AssertionError("a cut before the first block crosses the input alone")

    def _batch_norm(self) -> str:
        states = {stage.batch_norm for stage in self.tuned}
        return states.pop() if len(states) == 1 else "train" if states else "frozen"

    def _extract(self, prefix: FrozenPrefix, view: str) -> Extracted:
        self.progress.phase(f"frozen features, {view}", len(self.data.labels))
        with self._timed("features"):
            found = extract(prefix, self.data.parts, (view,), on_progress=self.progress.update)
        self.outcome.cache.update(
            images=len(self.data.labels),
            views=self.outcome.cache.get("views", 0) + 1,
            activation_shape=list(found.activations.shape[2:]),
            bytes=self.outcome.cache.get("bytes", 0) + found.activations.nbytes,
            images_per_second=round(found.images_per_second, 1),
        )
        return found

    def _fit_probe(self, extracted: Extracted) -> Probe:
        self.progress.phase("probe")
        data = self.data
        rows, held = (data.all_rows, data.held[:0]) if self._pools() else (data.rows, data.held)
        with self._timed("probe"):
            return fit_probe(
                extracted.features, data.labels, data.weights, data.groups, rows, held, data.num_classes,
                seed=self.plan.seed,
            )  # fmt: skip

    def _pools(self) -> bool:
        return self.data.may_pool and len(self.data.labels) <= CROSS_FIT_IMAGES

    def _splits(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Where fine-tuning is judged: the validation part, or folds of everything where images are few."""
        data = self.data
        if not self._pools():
            return [(data.rows, data.held)]
        return make_folds(data.labels, data.groups, data.all_rows, data.held[:0], seed=self.plan.seed)[0]

    def _judge_probe(self) -> None:
        """Held-out probabilities of the probe on what fine-tuning is judged on."""
        assert self.probe
        splits = self._splits()
        features = self._features
        scores = [_log_softmax(self.probe.head(rows).logits(features[held])) for rows, held in splits]
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
        if self.probe and self.plan.augment == "auto":
            mirrored = self._fit_probe(both)
            rise = mirrored.held_log_losses - self.probe.held_log_losses
            error = float(rise.std(ddof=1) / len(rise) ** 0.5)
            used = bool(rise.mean() <= error)
            self.outcome.selection["mirror"] = {
                "log_loss_rise": float(rise.mean()),
                "standard_error": error,
                "used": used,
            }
            if not used:
                return extracted
            self.probe = mirrored
        return both

    def _adapt(self, cut: Cut, extracted: Extracted) -> dict[str, str] | None:
        if self._batch_norm() != "adapt":
            return None
        adapt_batch_norm(cut.suffix, extracted.activations[0][self.data.rows])
        return digest_frozen(self.model)

    # -- fine-tuning ----------------------------------------------------------------------------------------------

    def _tune(self, cut: Cut, extracted: Extracted) -> None:
        splits = self._splits()
        origin = cut.suffix.get_weights()
        kept = self._with_head(origin, self._probe_head(self.data.all_rows), 1.0) if self.probe else origin
        best = kept
        try:
            starts = [self._start(origin, rows) for rows, _ in splits]
            rounds, ends = [], list(starts)
            for stage, depth in zip(self.tuned, self.depths, strict=True):
                trainer = self._trainer(cut, extracted, stage, depth)
                chosen, runs = self._measure(trainer, stage, splits, ends)
                rounds.append(chosen)
                ends = [run.weights for run in runs]
            share = self._choose(trainer, splits, starts, ends)
            if share is None:
                return
            if len(splits) == 1:
                best = self._cooled(interpolate(starts[0], ends[0], share))
            best = self._refit(cut, extracted, origin, rounds, share) or best
            self.outcome.chosen = "fine_tune" if share == 1.0 else "blend"
        finally:
            cut.suffix.set_weights(best)
            if best is not kept:
                self.on_model("fine_tune")

    def _trainer(self, cut: Cut, extracted: Extracted, stage: Stage, depth: int) -> SuffixTrainer:
        freeze(self.model, depth, batch_norm=stage.batch_norm)
        return SuffixTrainer(
            cut_model(self.model, cut.depth).suffix if depth != cut.depth else cut.suffix,
            extracted, self.data.labels, self.data.weights, stage, self.plan.batch_size,
        )  # fmt: skip

    def _measure(self, trainer, stage, splits, starts) -> tuple[dict, list[Trained]]:
        """Choose the rate on the first split by short runs, then train once on each split."""
        epochs = self._epochs(stage, len(splits[0][0]))
        rate = self._choose_rate(trainer, stage, splits[0], starts[0], epochs)
        runs = []
        for index, ((rows, held), start) in enumerate(zip(splits, starts, strict=True)):
            self.progress.phase(f"{stage.name}, held-out run {index + 1} of {len(splits)}")
            trainer.start = start
            with self._timed("fine_tune"):
                run = trainer.run(
                    rows, rate, held=held, epochs=epochs, seed=self.plan.seed, first_epoch=len(self.outcome.history),
                    callbacks=[*self._watch(epochs), *(self.callbacks if len(splits) == 1 else ())],
                )  # fmt: skip
            runs.append(run)
            if len(splits) == 1:
                self._log(stage.name, run)
        used = int(np.median([run.epochs for run in runs]))
        self.outcome.selection[stage.name] = {
            **self.outcome.selection.get(stage.name, {}),
            "learning_rate": rate,
            "epochs": epochs,
            "best_epoch": used,
            "loss": float(np.mean([run.loss for run in runs])),
        }
        return {"stage": stage, "rate": rate, "epochs": epochs, "stop_after": used}, runs

    def _epochs(self, stage: Stage, count: int) -> int:
        """At least MIN_STEPS steps: ten epochs of a hundred images would be forty steps, too few to move anything."""
        steps = -(-count // self.plan.batch_size)
        return max(stage.epochs, -(-MIN_STEPS // steps)) if stage.min_steps else stage.epochs

    def _choose_rate(self, trainer, stage, split, start, epochs: int) -> float:
        if len(stage.learning_rates) == 1:
            return stage.learning_rates[0]
        rows, held = split
        trainer.start = start
        short = max(2, round(epochs * 0.3))
        losses: dict[float, float] = {}
        for rate in stage.learning_rates:
            self.progress.phase(f"{stage.name}, learning rate {rate:g}")
            with self._timed("learning_rate"):
                run = trainer.run(
                    rows, rate, held=held, epochs=short, seed=self.plan.seed, callbacks=self._watch(short)
                )
            losses[rate] = run.loss if np.isfinite(run.loss) else float("inf")
            if self.clock.expired():
                break
        best = min(losses, key=losses.__getitem__)
        self.outcome.selection[stage.name] = {"rates": {f"{rate:g}": loss for rate, loss in losses.items()}}
        return best

    def _choose(self, trainer, splits, starts, ends) -> float | None:
        """The share of the blend, by held-out log loss; None where it is not surely better than the probe."""
        data, scores = self.data, {}
        labels, weights = data.labels[self._judged(splits)], data.weights[self._judged(splits)]
        for share in BLEND_SHARES if self.probe else (1.0,):
            parts = []
            for (_, held), start, end in zip(splits, starts, ends, strict=True):
                trainer.suffix.set_weights(interpolate(start, end, share))
                parts.append(trainer.log_probabilities(held))
            scores[share] = np.concatenate(parts)
        # Label smoothing leaves a model too unsure, a small set too sure; a temperature makes the shares comparable.
        found = {share: best_temperature(table, labels, weights) for share, table in scores.items()}
        share = min(found, key=lambda share: found[share][1])
        self._temperature = found[share][0]
        tuned = np.exp(_log_softmax(scores[share] / self._temperature))
        self.outcome.selection["blend"] = {
            "log_loss": {str(key): loss for key, (_, loss) in found.items()},
            "share": share,
            "temperature": self._temperature,
        }
        if self.probe:
            groups = [data.groups[row] for row in self._judged(splits)]
            gain = paired_difference(
                tuned,
                self.outcome.held_probabilities,
                labels,
                metric=self.plan.metric,
                groups=groups,
                seed=self.plan.seed,
            )
            wins = gain["difference"] > gain["standard_error"]
            self.outcome.selection["fine_tune_against_probe"] = {
                "metric": self.plan.metric,
                "probe": metric_value(self.plan.metric, labels, self.outcome.held_probabilities),
                "fine_tuned": metric_value(self.plan.metric, labels, tuned),
                **gain,
                "replaces_probe": bool(wins),
            }
            if not wins:
                return None
        self.outcome.held, self.outcome.held_probabilities = self._judged(splits), tuned
        return share

    def _refit(self, cut, extracted, origin, rounds, share: float) -> list[np.ndarray] | None:
        """The same decisions on train and validation part together; None where the time does not allow it."""
        rows = self.data.all_rows
        spent = self.outcome.seconds.get("fine_tune", 0.0) / max(len(self._splits()), 1)
        if self.clock.remaining() < 1.2 * spent * len(rows) / max(len(self.data.rows), 1):
            self.outcome.selection["refit"] = "left out: the time limit did not allow it"
            return None
        start = self._start(origin, rows)
        end = start
        for chosen, depth in zip(rounds, self.depths, strict=True):
            stage = chosen["stage"]
            self.progress.phase(f"{stage.name}, refit on train and validation part")
            trainer = self._trainer(cut, extracted, stage, depth)
            trainer.start = end
            with self._timed("refit"):
                run = trainer.run(
                    rows, chosen["rate"], epochs=chosen["epochs"], stop_after=chosen["stop_after"], seed=self.plan.seed,
                    first_epoch=len(self.outcome.history),
                    callbacks=[*self._watch(chosen["stop_after"]), *self.callbacks],
                )  # fmt: skip
            self._log(f"{stage.name} (refit)", run)
            end = run.weights
        self.outcome.selection["refit"] = "train and validation part"
        return self._cooled(interpolate(start, end, share))

    # -- small things -----------------------------------------------------------------------------------------------

    def _judged(self, splits) -> np.ndarray:
        return np.concatenate([held for _, held in splits])

    def _probe_head(self, rows) -> LinearHead:
        assert self.probe
        return self.probe.head(rows)

    def _start(self, origin, rows) -> list[np.ndarray]:
        if not self.probe:
            return origin
        return self._with_head(origin, self._probe_head(rows), self.probe.temperature)

    def _with_head(self, weights, head: LinearHead, temperature: float) -> list[np.ndarray]:
        return [*weights[:-2], head.kernel / temperature, head.bias / temperature]

    def _cooled(self, weights) -> list[np.ndarray]:
        return [*weights[:-2], weights[-2] / self._temperature, weights[-1] / self._temperature]

    def _set_head(self, head: LinearHead) -> None:
        self.model.get_layer("logits").set_weights([head.kernel, head.bias])

    def _log(self, stage: str, run: Trained) -> None:
        self.outcome.history += [{"stage": stage, **entry} for entry in run.history]

    def _watch(self, epochs: int) -> list[keras.callbacks.Callback]:
        return [StopOnTime(self.clock), _Epochs(self.progress, epochs)]

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.outcome.seconds[phase] = self.outcome.seconds.get(phase, 0.0) + time.perf_counter() - started


class _Epochs(keras.callbacks.Callback):
    def __init__(self, progress: Progress, epochs: int):
        super().__init__()
        self.progress, self.epochs, self.done = progress, epochs, 0

    def on_epoch_end(self, epoch, logs=None):
        self.done += 1
        self.progress.update(self.done, self.epochs)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))

"""The contract with KerasTuner: its tuners, unchanged, on real (small) data."""

import dataclasses

import keras_tuner
import numpy as np
import pytest
from small_networks import spoil

from tfxfer.data import load_data
from tfxfer.errors import InputError
from tfxfer.metrics import metric_value
from tfxfer.sources.catalog import get_source
from tfxfer.train.training_data import training_data
from tfxfer.tuning.hypermodel import SpaceError, TransferHyperModel, default_plan
from tfxfer.tuning.shared import SharedFeatures
from tfxfer.tuning.space import default_space

CARD = get_source("digits_cnn")
QUIET = {"verbose": 0}


@pytest.fixture(scope="module")
def arrays(digits):
    images, labels = digits
    order = np.random.default_rng(0).permutation(len(labels))[:180]
    return images[order[:120]], labels[order[:120]], images[order[120:]], labels[order[120:]]


@pytest.fixture(scope="module")
def data(arrays):
    x, y, x_held, y_held = arrays
    return load_data({"train": (x, y), "val": (x_held, y_held)}, test_fraction=0.0, near_duplicates=False)


def space_of(**changes):
    """Depth and rate; two short epochs."""
    plan = default_plan(CARD)
    stage = dataclasses.replace(plan.recipe.stages[-1], epochs=2, min_steps=False, **changes)
    recipe = dataclasses.replace(plan.recipe, stages=(plan.recipe.stages[0], stage))
    return default_space(dataclasses.replace(plan, recipe=recipe), [CARD], keys=("freeze_depth", "learning_rate"))


def hypermodel(data, **options):
    return TransferHyperModel("digits_cnn", data, **{"space": space_of(), **options})


TUNERS = {
    "RandomSearch": {"max_trials": 3},
    "BayesianOptimization": {"max_trials": 3, "num_initial_points": 2},
    "GridSearch": {"max_trials": 3},
    "Hyperband": {"max_epochs": 4, "factor": 2},
}


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_works_unchanged(data, tmp_path, name):
    model = hypermodel(data, monitor="")
    tuner = getattr(keras_tuner, name)(
        model, "val_accuracy", directory=tmp_path, project_name="search", seed=1, **TUNERS[name]
    )
    tuner.search(data, **QUIET)
    best = tuner.oracle.get_best_trials(1)[0]
    assert best.score == max(trial.score for trial in tuner.oracle.trials.values() if trial.score is not None)

    loaded = tuner.get_best_models()[0]
    part = data.part("val")
    found = metric_value("accuracy", part.labels, loaded.predict(data.pixels("val", 32), verbose=0))
    assert found == pytest.approx(best.score)  # the checkpoint is the epoch that was scored
    assert found > 0.6
    finished = [record for record in model.records if record.trial]
    assert len(finished) == len(tuner.oracle.trials)
    depths = {record.trial.freeze_depth for record in finished}
    # Each depth once at the most, however many trials; the first source of features is not counted twice.
    assert model.passes.computed <= (len(depths) + 1) * 180


def test_hyperband_goes_on_from_the_weights_of_the_round_before(data, tmp_path):
    model = hypermodel(data, monitor="")
    tuner = keras_tuner.Hyperband(
        model, "val_accuracy", max_epochs=4, factor=2, directory=tmp_path, project_name="search", seed=1
    )
    tuner.search(data, **QUIET)
    gone_on = [record for record in model.records if record.values["tuner/initial_epoch"]]
    assert gone_on
    for record in gone_on:
        epochs = [epoch["epoch"] for epoch in record.trial.history]
        assert epochs == list(range(record.values["tuner/initial_epoch"], record.values["tuner/epochs"]))


def test_arrays_are_searched_as_keras_users_give_them(arrays, tmp_path):
    x, y, x_held, y_held = arrays
    model = TransferHyperModel("digits_cnn", 10, space=space_of())
    tuner = keras_tuner.RandomSearch(model, "val_accuracy", max_trials=2, directory=tmp_path, seed=1)
    tuner.search(x, y, validation_data=(x_held, y_held), **QUIET)
    assert tuner.oracle.get_best_trials(1)[0].score > 0.6 and len(model._shared) == 1


def test_another_objective_and_several_executions(data, tmp_path):
    model = hypermodel(data)
    tuner = keras_tuner.RandomSearch(
        model, keras_tuner.Objective("val_macro_f1", "max"), max_trials=1, executions_per_trial=2, directory=tmp_path
    )
    tuner.search(data, **QUIET)
    first, second = (record.trial for record in model.records)
    assert [record.plan.seed for record in model.records] == [0, 1]
    assert not np.array_equal(first.weights[0], second.weights[0])
    scores = [max(epoch["val_macro_f1"] for epoch in trial.history) for trial in (first, second)]
    assert tuner.oracle.get_best_trials(1)[0].score == pytest.approx(np.mean(scores))


def test_a_trial_whose_loss_is_no_number_fails_by_name_and_the_search_goes_on(data, tmp_path, monkeypatch):
    model, whole = hypermodel(data), TransferHyperModel.shared
    poisoned = []

    def once(self, plan, data):
        """Of the first trial what crosses the cut is no number, as where a source overflows."""
        if poisoned:
            return whole(self, plan, data)
        poisoned.append(SharedFeatures(self._model(plan), training_data(data, plan)))
        spoil(poisoned[0].at(plan.recipe.stages[-1].freeze_depth), 3)
        return poisoned[0]

    monkeypatch.setattr(TransferHyperModel, "shared", once)
    tuner = keras_tuner.GridSearch(model, "val_accuracy", max_trials=3, directory=tmp_path)
    tuner.search(data, **QUIET)
    assert model.records[0].trial is None and "not a number" in model.records[0].failed
    failed = [trial for trial in tuner.oracle.trials.values() if trial.status == "FAILED"]
    assert failed and "not a number" in failed[0].message
    assert any(trial.status == "COMPLETED" for trial in tuner.oracle.trials.values())


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (lambda hp: None, "The space must return a tfxfer.Plan, not NoneType"),
        (lambda hp: _deep(hp), "cannot be trained"),
        (lambda hp: space_of(batch_norm="adapt")(hp), "cannot be trained: Stage .* batch_norm 'adapt'"),
        (lambda hp: dataclasses.replace(space_of()(hp), dropout=2.0), "The space gave no plan: Dropout"),
    ],
)
def test_a_space_without_a_plan_to_train_is_refused_at_once(data, tmp_path, space, told):
    with pytest.raises(SpaceError, match=told):
        keras_tuner.RandomSearch(hypermodel(data, space=space), "val_accuracy", directory=tmp_path)


def _deep(hp):
    plan = space_of()(hp)
    stage = dataclasses.replace(plan.recipe.stages[-1], freeze_depth=99)
    return dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, stages=(plan.recipe.stages[0], stage)))


def test_data_that_is_none_ends_the_search_with_a_sentence(data, tmp_path):
    tuner = keras_tuner.RandomSearch(hypermodel(data), "val_accuracy", directory=tmp_path)
    with pytest.raises(InputError, match=r"Give tuner.search a Dataset of tfxfer.load_data"):
        tuner.search(np.zeros((3, 32, 32, 3)), **QUIET)

import dataclasses

import keras_tuner
import pytest

from tfxfer.errors import InputError
from tfxfer.sources.catalog import get_source
from tfxfer.specs import Plan
from tfxfer.train.recipes import get_recipe
from tfxfer.tuning.hypermodel import default_plan
from tfxfer.tuning.space import ALL_KEYS, default_space, depths_of, describe, sizes_of, with_stage

MOBILENET, LITE, DIGITS = map(
    get_source, ("mobilenet_v2_imagenet", "efficientnet_lite0_imagenet", "digits_cnn")
)  # fmt: skip


def plan_and_values(space, **values):
    hp = keras_tuner.HyperParameters()
    hp.values.update(values)
    return space(hp), hp.values


def test_depths_go_from_none_to_all_but_the_last_block():
    depths = depths_of(MOBILENET)
    assert depths[0] == 0 and depths[-1] == len(MOBILENET.blocks) - 1 and len(depths) == 10
    assert depths_of(DIGITS) == list(range(len(DIGITS.blocks)))


def test_every_value_reaches_the_plan():
    given = {
        "freeze_depth": 7, "learning_rate": 2e-4, "layer_decay": 0.8, "weight_decay": 0.03, "dropout": 0.4,
        "head": "ridge", "augment": "mirror", "image_size": 160,
    }  # fmt: skip
    plan, values = plan_and_values(default_space(default_plan(MOBILENET), [MOBILENET], keys=ALL_KEYS), **given)
    assert values == given
    probe, stage = plan.recipe.stages
    assert probe.solver == "ridge" and plan.augment == "mirror" and plan.image_size == 160 and plan.dropout == 0.4
    found = stage.freeze_depth, stage.learning_rates, stage.layer_decay, stage.weight_decay
    assert found == (7, (2e-4,), 0.8, 0.03)


def test_what_is_no_key_stays_as_the_plan_has_it():
    base = dataclasses.replace(default_plan(MOBILENET), dropout=0.33)
    plan, values = plan_and_values(default_space(base, [MOBILENET], keys=("freeze_depth",)))
    assert set(values) == {"freeze_depth"} and plan.dropout == 0.33
    assert dataclasses.replace(plan, recipe=with_stage(plan.recipe, {"freeze_depth": 0}, {})) == base


def test_depths_of_several_sources_are_their_own():
    space = default_space(default_plan(MOBILENET), [MOBILENET, LITE], keys=("freeze_depth",))
    plan, values = plan_and_values(space, source=LITE.name, **{f"freeze_depth/{LITE.name}": depths_of(LITE)[-1]})
    assert plan.source == LITE.name and plan.recipe.stages[-1].freeze_depth == depths_of(LITE)[-1]
    assert describe({**values, "tuner/epochs": 3}) == {"source": LITE.name, "freeze_depth": depths_of(LITE)[-1]}


def test_sizes_are_the_plan_s_and_a_smaller_one_where_the_source_takes_it():
    assert sizes_of(224, MOBILENET) == [160, 224]
    assert sizes_of(32, DIGITS) == [32]


def test_no_table_decides_over_what_was_chosen():
    assert not with_stage(get_recipe("auto"), {"freeze_depth": 2, "learning_rates": (1e-3,)}, {}).by_table


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"keys": ("deepness",)}, "The default space has no 'deepness'; there are freeze_depth, "),
        ({"plan": Plan("digits_cnn", get_recipe("probe"), image_size=32)}, "Recipe 'probe' fine-tunes nothing"),
        ({"cards": [dataclasses.replace(DIGITS, blocks=(), fine_tune_depth=-1)]}, "has no list of blocks"),
    ],
)
def test_what_cannot_be_searched_is_refused(change, told):
    given = {"plan": default_plan(DIGITS), "cards": [DIGITS], **change}
    with pytest.raises(InputError, match=told):
        default_space(given.pop("plan"), given.pop("cards"), **given)

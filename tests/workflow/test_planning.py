import dataclasses

import numpy as np
import pytest
import tomli_w

from tfxfer.errors import InputError
from tfxfer.sources.catalog import get_source, list_sources
from tfxfer.specs import Plan, Recipe, Stage, read_toml
from tfxfer.train.recipes import RECIPES, get_recipe
from tfxfer.workflow.planning import DEFAULT_SOURCE, make_plan


def written(tmp_path, text: str):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_left_open_comes_from_the_default_source_and_recipe():
    plan = make_plan()
    assert plan.source == DEFAULT_SOURCE and plan.recipe == get_recipe("auto")
    assert plan.image_size == get_source(DEFAULT_SOURCE).image_size_px
    assert plan == make_plan(source=None, seed=None, epochs=None)


@pytest.mark.parametrize("source", [card.name for card in list_sources()])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_plan_written_and_read_is_the_same_plan(source, recipe, tmp_path):
    plan = make_plan(source=source, recipe=recipe, seed=5, group_by=r"^(\d+)_", time_limit_seconds=90.0, batch_size=16)
    path = written(tmp_path, tomli_w.dumps(plan.to_dict()))
    assert make_plan(path) == plan
    assert Plan.from_dict(read_toml(path)) == plan


def test_arguments_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = written(tmp_path, 'source = "digits_cnn"\nseed = 4\nbatch_size = 8\nrecipe = "probe"\n')
    plan = make_plan(path, seed=9)
    assert (plan.source, plan.seed, plan.batch_size, plan.recipe.name, plan.image_size) == (
        "digits_cnn",
        9,
        8,
        "probe",
        32,
    )
    assert plan.metric == "accuracy"


def test_values_of_stages_go_to_the_fine_tuning_stages_only():
    plan = make_plan(recipe="auto", freeze_depth="3", epochs=4, learning_rate=1e-2, batch_norm="affine")
    probe, tuned = plan.recipe.stages
    assert probe == get_recipe("auto").stages[0]
    assert (tuned.freeze_depth, tuned.epochs, tuned.learning_rates, tuned.batch_norm) == ("3", 4, (0.01,), "affine")
    assert tuned.min_steps is False  # epochs asked for are epochs given
    assert make_plan(recipe="auto", freeze_depth=0).recipe.stages[1].min_steps is True
    assert make_plan(freeze_depth=0).recipe.stages[1].freeze_depth == 0  # zero is a value


def test_the_solver_of_the_probe_goes_to_the_first_stage_only():
    plan = make_plan(probe="ridge", epochs=4)
    assert [(stage.solver, stage.epochs) for stage in plan.recipe.stages] == [("ridge", 0), ("adamw", 4)]
    assert make_plan(method="probe", probe="prototype").recipe.stages[0].solver == "prototype"


def test_stage_values_change_the_recipe_of_a_file_too(tmp_path):
    path = written(tmp_path, tomli_w.dumps(make_plan(epochs=3).to_dict()))
    plan = make_plan(path, learning_rate=0.5)
    assert plan.recipe.stages[1].epochs == 3 and plan.recipe.stages[1].learning_rates == (0.5,)


def test_a_recipe_of_one_s_own_is_used_as_it_is():
    own = Recipe("own", (Stage("only", epochs=2),))
    assert make_plan(recipe=own).recipe is own
    assert make_plan(recipe={"name": "own", "stages": [{"name": "only", "epochs": 2}]}).recipe == own


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"source": "digits"}, r"Unknown source 'digits'\. Did you mean 'digits_cnn'"),
        ({"source": "hob:some/model"}, r"Unknown kind of source 'hob' in 'hob:some/model'\. Did you mean 'hub'"),
        ({"source": "hub:"}, r"'hub:' names no source: something must stand behind the colon"),
        ({"recipe": "atuo"}, r"Unknown recipe 'atuo'\. Did you mean 'auto'"),
        ({"recipe": "probe", "epochs": 3}, r"Recipe 'probe' has no fine-tuning stage, so epochs would do nothing"),
        ({"recipe": Recipe("own", (Stage("a"),)), "epochs": 3}, r"epochs given beside a recipe of your own, 'own'"),
        ({"probe": "lasso"}, r"probe must be one of convex, ridge, prototype, not 'lasso'"),
        ({"epochs": 0}, r"epochs must be at least 1, not 0"),
        ({"learning_rate": -1.0}, r"learning rates must lie between 0 and 10"),
        ({"batch_norm": "free"}, r"batch_norm must be one of frozen, affine, adapt, train, not 'free'"),
        ({"metric": "auc"}, r"metric must be one of accuracy, macro_f1, balanced_accuracy, not 'auc'"),
        ({"baseline": "slow"}, r"baseline must be 'quick', 'scratch' or 'none', not 'slow'"),
        ({"augment": "flip"}, r"augment must be"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"batch_size": 0}, r"batch size must be at least 1"),
        ({"val_fraction": 1.0}, r"fraction must lie between 0 and 1"),
        ({"num_seeds": 0}, r"number of seeds must be at least 1"),
        ({"seed": -1}, r"seed must be a whole number from 0 to 2147483647, not -1"),
        ({"sede": 1}, r"Unknown key 'sede' in the plan\. Did you mean 'seed'"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(given, sentence):
    with pytest.raises(InputError, match=f"(?i){sentence}"):
        make_plan(**given)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("souce = 'digits_cnn'", r"config\.toml: unknown key 'souce'\. Did you mean 'source'"),
        ("source = ", r"config\.toml is not a TOML file"),
        ("seed = 'three'", r"'seed' in the plan must be a whole number, not 'three'"),
        ("[recipe]\nname = 'own'\nstages = []", r"[Rr]ecipe 'own' has no stage"),
        (
            "[recipe]\nname = 'own'\n[[recipe.stages]]\nname = 'a'\nepoch = 3",
            r"Unknown key 'epoch' in the stage\. Did you mean",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_key(text, sentence, tmp_path):
    with pytest.raises(InputError, match=f"(?i){sentence}"):
        make_plan(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"Cannot read .*gone\.toml: No such file"):
        make_plan(tmp_path / "gone.toml")


def test_a_plan_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_plan().seed = 3


def test_a_recipe_file_is_read_and_written_out(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[[stages]]\nname = "only"\nepochs = 2\nmixup = 0.2\n', encoding="utf-8")
    plan = make_plan(source="digits_cnn", recipe=str(path), epochs=5)
    assert plan.recipe.name == "mine" and plan.recipe.stages == (Stage("only", epochs=5, mixup=0.2, min_steps=False),)
    assert make_plan(written(tmp_path, tomli_w.dumps(plan.to_dict()))) == plan  # the file is no longer needed


def test_one_freeze_depth_would_undo_gradual_unfreezing():
    with pytest.raises(InputError, match="'gradual' says for each of its stages what is frozen"):
        make_plan(recipe="gradual", freeze_depth=3)
    assert make_plan(recipe="gradual", epochs=3).recipe.stages[2].epochs == 3


@pytest.mark.parametrize(("side", "expected"), [(40, 128), (120, 384)])
def test_bit_takes_its_resolution_from_the_images(side, expected):
    data = (np.zeros((6, side, side, 3), np.uint8), np.arange(6) % 2)
    assert make_plan(recipe="bit", data=data).image_size == expected
    assert make_plan(recipe="bit", data=data, image_size=64).image_size == 64
    assert make_plan(recipe="full", data=data).image_size == make_plan().image_size


def test_a_learning_rate_may_be_found():
    assert make_plan(learning_rate="find").recipe.stages[1].find_rate is True
    given = make_plan(learning_rate="0.002").recipe.stages[1]
    assert (given.find_rate, given.learning_rates) == (False, (0.002,))
    with pytest.raises(InputError, match="must be a number or 'find', not 'fnd'"):
        make_plan(learning_rate="fnd")

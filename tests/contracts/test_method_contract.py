"""Every method runs every recipe's stages that it is for, keeps what is frozen, and beats chance on real digits."""

import pytest
import tomli_w

import tfxfer
from tfxfer.methods import METHODS
from tfxfer.specs import Plan, Recipe, Stage, read_toml
from tfxfer.train.recipes import RECIPES

SHORT = Recipe(
    "short",
    (Stage("probe", solver="convex", epochs=0), Stage("tune", epochs=2, learning_rates=(1e-3,), min_steps=False)),
)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_after_its_key_and_survives_toml(name, tmp_path):
    recipe = tfxfer.get_recipe(name)
    assert recipe.name == name and len({stage.name for stage in recipe.stages}) == len(recipe.stages)
    file = tmp_path / "config.toml"
    plan = Plan(source="digits_cnn", recipe=recipe)
    file.write_text(tomli_w.dumps(plan.to_dict()))
    assert Plan.from_dict(read_toml(file)) == plan
    assert all(stage.solver != "convex" for stage in recipe.stages[1:]), "a probe sets the head: it comes first"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_method_takes_stages_of_the_recipe_in_order(method, name):
    stages = METHODS[method](tfxfer.get_recipe(name))
    assert stages and all(isinstance(stage, Stage) for stage in stages)
    places = [tfxfer.get_recipe(name).stages.index(stage) for stage in stages]
    assert places == sorted(set(places))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_a_recipe_without_a_stage_for_it(method):
    only = Recipe("only", (Stage("tune"),))
    assert METHODS[method](only), "something is trained, whatever the recipe"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_a_complete_run(method, digit_folder, tmp_path):
    run = tfxfer.fit(
        "digits_cnn", digit_folder, SHORT, method=method, baseline="none", formats=(), out=tmp_path / "run"
    )
    info = tfxfer.load_run(run.path).info
    assert info["status"] == "complete" and info["plan"]["method"] == method
    assert info["freeze_audit"]["bit_identical"] is True
    assert run.metrics["test"]["accuracy"]["value"] >= 0.8  # chance is a third
    again = tfxfer.load_run(run.path).predict(digit_folder.rglob("*.png"))
    assert again.shape == (36, 3) and abs(again.sum(axis=1) - 1).max() < 1e-5

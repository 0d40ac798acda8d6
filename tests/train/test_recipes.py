import dataclasses

import numpy as np
import pytest
from small_networks import around, moved, norm_backbone, norm_model, values

from tfxfer.errors import InputError
from tfxfer.methods.schedule import SCHEDULES
from tfxfer.specs import Stage
from tfxfer.specs import recipe as words
from tfxfer.train.bit import bit_image_size, bit_stage
from tfxfer.train.recipes import FOLDER, RECIPES, get_recipe

OWN = """
by_table = false
[[stages]]
name = "last"
freeze_depth = 0.5
learning_rates = [1e-3]
"""


def test_every_recipe_begins_with_a_probe_and_names_its_source():
    assert set(RECIPES) == {"affine", "auto", "bit", "full", "gradual", "probe"}
    for name in RECIPES:
        assert get_recipe(name).name == name and get_recipe(name).stages[0].is_probe
        assert (FOLDER / f"{name}.toml").read_text(encoding="utf-8").startswith("# ")


def test_a_recipe_of_one_s_own_is_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    for spelling in (path, str(path)):
        recipe = get_recipe(spelling)
        assert recipe.name == "mine"
        assert recipe.stages == (Stage("last", freeze_depth=0.5, learning_rates=(1e-3,)),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "Cannot read .*mine.toml: No such file"),
        ("[[stages", "mine.toml is not a TOML file"),
        ("epochs = 3", "mine.toml is no recipe: Unknown key 'epochs' in the recipe"),
        ("", "mine.toml is no recipe: The recipe is not complete: it needs 'stages'."),
        (OWN.replace("freeze_depth", "freeze_deep"), "mine.toml is no recipe: .*Did you mean 'freeze_depth'"),
        (OWN + 'schedule = "cosin"', "mine.toml is no recipe: Stage 'last': schedule must be one of cosine"),
        ("stages = 3", "mine.toml is no recipe: .*stages must be a list of tables"),
        ("stages = [3]", "mine.toml is no recipe: .*each stage must be a table"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, told):
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=told):
        get_recipe(path)


def test_an_unknown_recipe_gets_near_matches():
    with pytest.raises(InputError, match=r"Unknown recipe 'gradul'. Did you mean 'gradual'"):
        get_recipe("gradul")


def test_gradual_unfreezes_from_the_top_downwards():
    depths = [stage.freeze_depth for stage in get_recipe("gradual").stages[1:]]
    assert depths == sorted(depths, reverse=True) and depths[-1] == 0 and len(set(depths)) == len(depths) > 2


# -- BiT -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "supports", "mixup"),
    [
        (200, (100, 200, 300, 400, 500), 0.0),
        (19_999, (100, 200, 300, 400, 500), 0.0),
        (20_000, (500, 3000, 6000, 9000, 10_000), 0.1),
        (500_000, (500, 6000, 12_000, 18_000, 20_000), 0.1),
    ],
)
def test_bit_has_the_rates_of_its_authors_code(count, supports, mixup):
    stage = bit_stage(get_recipe("bit").stages[1], count)
    assert (stage.steps, stage.mixup, stage.solver, stage.learning_rates) == (supports[-1], mixup, "sgd", (0.003,))
    for step in range(0, supports[-1], supports[-1] // 500):
        rate = 1.0  # their get_lr
        if step < supports[0]:
            rate *= step / supports[0]
        else:
            for support in supports[1:]:
                if support < step:
                    rate /= 10
        assert SCHEDULES[stage.schedule](step, stage.steps, stage) == pytest.approx(rate), step


def test_bit_asked_for_in_epochs_keeps_those():
    stage = dataclasses.replace(get_recipe("bit").stages[1], steps=0, epochs=3)
    assert (bit_stage(stage, 30_000).steps, bit_stage(stage, 30_000).epochs) == (0, 3)


def test_bit_goes_by_the_area_of_images():
    assert [bit_image_size(area) for area in (28 * 28, 96 * 96 - 1, 96 * 96, 4000 * 3000)] == [128, 128, 384, 384]


def test_the_slanted_triangle_is_that_of_the_paper():
    """Equation 3: cut = floor(T cut_frac), p by two lines, eta = eta_max (1 + p (ratio - 1)) / ratio."""
    stage, total = Stage("x", schedule="slanted", warmup_share=0.1), 50
    cut = int(total * 0.1)
    for step in range(total):
        share = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / 0.1 - 1))
        assert SCHEDULES["slanted"](step, total, stage) == pytest.approx((1 + share * 31) / 32)


def test_the_names_of_schedules_are_functions():
    assert tuple(SCHEDULES) == words.SCHEDULES


# -- affine --------------------------------------------------------------------------------


def test_affine_moves_bias_gamma_and_beta_and_the_head_alone():
    import keras

    from tfxfer.model.freeze import audit_frozen, digest_frozen, freeze, leading_blocks

    backbone = norm_backbone()
    x = keras.layers.Dense(4, name="d_dense")(backbone.output)
    x = keras.layers.LayerNormalization(name="d_norm")(x)
    model = around(keras.Model(backbone.input, x, name="with_dense"))
    freeze(model, 0, batch_norm="affine", parameters="affine")
    expected = {f"{name}_bn/{part}" for name in "abc" for part in ("gamma", "beta")}
    expected |= {"d_dense/bias", "d_norm/gamma", "d_norm/beta", "logits/kernel", "logits/bias"}
    assert {variable.path for variable in model.trainable_variables} == expected
    assert leading_blocks(model, 0) == 0  # nothing can be computed once: the first block has gamma and beta

    before, all_before = digest_frozen(model), values(model)
    assert "a_conv/kernel" in before and "a_bn/moving_mean" in before and "a_bn/gamma" not in before
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    model.fit(np.random.default_rng(0).uniform(0, 255, (8, 16, 16, 3)), np.arange(8) % 3, verbose=0)
    assert moved(all_before, model) == expected
    assert audit_frozen(model, before)["num_variables"] == len(backbone.weights) + 2 + 2 - 6 - 3

    freeze(model, "b_conv", batch_norm="affine", parameters="affine")
    assert not any(variable.path.startswith(("a_", "b_")) for variable in model.trainable_variables)
    freeze(model, 0, batch_norm="train")  # sets the state, whatever it was
    assert {"a_conv/kernel", "d_dense/kernel"} <= {variable.path for variable in model.trainable_variables}


def test_unknown_parameters_get_near_matches():
    from tfxfer.model.freeze import freeze

    with pytest.raises(InputError, match=r"Unknown parameters 'afine'. Did you mean 'affine'"):
        freeze(norm_model(), 0, parameters="afine")


def test_affine_where_there_is_nothing_of_it_is_refused():
    from tfxfer.model.freeze import freeze

    with pytest.raises(InputError, match="is a bias, gamma or beta by its name"):
        freeze(norm_model(), 1, batch_norm="frozen", parameters="affine")
    assert freeze(norm_model(), "all", batch_norm="frozen", parameters="affine").trainable_variables  # the head

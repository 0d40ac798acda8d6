"""Every architecture builds the same network from the same seed, with names from which blocks follow."""

import keras
import numpy as np
import pytest

from tfxfer.sources.builders import BUILDERS, TORCH_MODULES
from tfxfer.sources.catalog import list_sources

SIZE = {card.architecture: card.min_image_size_px for card in list_sources()}
ARCHITECTURES = pytest.mark.parametrize("name", BUILDERS)


def images(size, count=3):
    return np.random.default_rng(0).normal(0, 1, (count, size, size, 3)).astype("float32")


def test_every_architecture_has_a_card():
    assert set(BUILDERS) == set(SIZE)
    assert set(TORCH_MODULES) <= set(BUILDERS)


@ARCHITECTURES
def test_a_seed_gives_one_network(name):
    first, same, other = (BUILDERS[name](SIZE[name], seed=seed) for seed in (1, 1, 2))
    kernels = [index for index, weight in enumerate(first.weights) if weight.path.endswith("kernel")]
    assert len(kernels) > 3
    for index in kernels:
        values = [model.weights[index].numpy() for model in (first, same, other)]
        np.testing.assert_array_equal(values[0], values[1])
        assert not np.array_equal(values[0], values[2])


@ARCHITECTURES
def test_it_is_a_functional_model_named_after_its_architecture(name):
    model = BUILDERS[name](SIZE[name], seed=0)
    assert isinstance(model, keras.Model) and not isinstance(model, keras.Sequential) and model.name == name
    again = keras.Model.from_config(model.get_config())
    assert [layer.name for layer in again.layers] == [layer.name for layer in model.layers]
    assert not any(isinstance(layer, keras.layers.Dropout) for layer in model.layers), "the head brings the dropout"


@ARCHITECTURES
def test_the_top_only_adds_to_the_features(name):
    features, logits = (BUILDERS[name](SIZE[name], include_top=top, seed=3) for top in (False, True))
    shared = [layer.name for layer in features.layers]
    assert [layer.name for layer in logits.layers][: len(shared)] == shared
    x = images(SIZE[name])
    cut = keras.Model(logits.input, logits.get_layer(shared[-1]).output)
    np.testing.assert_allclose(cut.predict(x, verbose=0), features.predict(x, verbose=0), atol=1e-5)


@ARCHITECTURES
def test_an_image_alone_gets_what_it_gets_in_a_batch(name):
    model = BUILDERS[name](SIZE[name], seed=0)
    x = images(SIZE[name])
    together = model(x, training=False).numpy()
    assert np.isfinite(together).all() and together.std() > 0
    np.testing.assert_allclose(model(x[1:2], training=False).numpy(), together[1:2], atol=1e-4 * np.abs(together).max())


@pytest.mark.parametrize("name", TORCH_MODULES)
def test_every_weight_has_a_torch_module(name):
    model = BUILDERS[name](SIZE[name], include_top=True, seed=0)
    with_weights = {layer.name for layer in model.layers if layer.weights}
    assert set(TORCH_MODULES[name]().values()) == with_weights

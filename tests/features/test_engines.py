import keras
import numpy as np
import onnxruntime
import pytest
from small_networks import around, norm_model, pictures, skip_backbone

from tfxfer.features import engines as engines_module
from tfxfer.features.cache import FeatureCache
from tfxfer.features.convert import convert_graph
from tfxfer.features.cut import cut_model
from tfxfer.features.engines import ONNXRUNTIME, TENSORFLOW, EngineChoice, Engines
from tfxfer.features.extract import FrozenPrefix, extract

PARTS = (pictures(20, seed=1), pictures(5, seed=2))
IMAGES = np.concatenate(PARTS)


def prefix_of(depth=1, model=norm_model) -> FrozenPrefix:
    return FrozenPrefix(cut_model(model(), depth), 8)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "features", "50MB")


@pytest.fixture
def converted(cache, monkeypatch):
    """Engines that chose onnxruntime, on whatever a measurement of a millisecond says."""
    monkeypatch.setattr(
        engines_module, "_speed", lambda engine, batch: 1.0 + isinstance(engine, engines_module.OnnxPrefix)
    )

    def choose(prefix):
        engines = Engines(prefix, cache=cache)
        return engines, engines.choose(IMAGES[:8], 10**6)

    return choose


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_onnxruntime_computes_what_keras_computes(converted, depth):
    prefix = prefix_of(depth)
    engines, choice = converted(prefix)
    assert choice.engine == ONNXRUNTIME and choice.conversion_seconds > 0
    found = extract(prefix, PARTS, engine=engines.engine())
    model = norm_model()
    cut = cut_model(model, depth)
    crossing = cut.prefix.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(found.activations[0, :], crossing, atol=1e-5)
    features = cut.tail.predict(crossing, verbose=0) if cut.tail else crossing
    np.testing.assert_allclose(found.features[0], features, atol=1e-5)
    again = extract(prefix, PARTS, engine=engines.engine())
    assert np.array_equal(again.features, found.features)  # a resumed run sees the same bits


def test_where_several_tensors_cross_their_order_is_kept(converted):
    prefix = prefix_of(2, lambda: around(skip_backbone()))
    engines, choice = converted(prefix)
    assert choice.engine == ONNXRUNTIME
    expected = extract(prefix, PARTS)
    found = extract(prefix, PARTS, engine=engines.engine())
    for ours, theirs in zip(found.activations[0, :], expected.activations[0, :], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(np.subtract(*expected.activations[0, :])).max() > 0.1  # a change of order would show


def test_the_next_run_does_not_convert_again(converted, monkeypatch):
    converted(prefix_of())
    monkeypatch.setattr(engines_module, "convert_graph", None)
    engines, choice = converted(prefix_of())
    assert choice.engine == ONNXRUNTIME and choice.conversion_seconds == 0
    replayed = Engines(prefix_of(), cache=engines.cache)
    replayed.settle(choice)
    np.testing.assert_array_equal(replayed.engine()(IMAGES[:3])[0], engines.engine()(IMAGES[:3])[0])


def test_few_images_do_not_pay_for_converting(cache, monkeypatch):
    monkeypatch.setattr(engines_module, "convert_graph", None)
    choice = Engines(prefix_of(), cache=cache).choose(IMAGES[:8], 25)
    assert choice.engine == TENSORFLOW and "would take" in choice.why and choice.images_per_second > 0


def test_other_numbers_a_slower_runtime_and_unknown_operations_leave_the_graph(converted, monkeypatch):
    plain = convert_graph(prefix_of().function)
    assert onnxruntime.InferenceSession(plain).get_inputs()[0].type == "tensor(uint8)"

    def other(prefix):
        cut = cut_model(norm_model(seed=1), 1)
        return convert_graph(FrozenPrefix(cut, 8).function)

    monkeypatch.setattr(engines_module, "convert_graph", other)
    _, choice = converted(prefix_of())
    assert choice.engine == TENSORFLOW and "other numbers" in choice.why
    monkeypatch.setattr(engines_module, "convert_graph", lambda function: b"no ONNX")
    _, choice = converted(prefix_of(2))
    assert choice.engine == TENSORFLOW and "cannot be converted" in choice.why
    monkeypatch.setattr(engines_module, "convert_graph", convert_graph)
    monkeypatch.setattr(engines_module, "_speed", lambda engine, batch: 1.0 + isinstance(engine, FrozenPrefix))
    _, choice = converted(prefix_of(3))
    assert choice.engine == TENSORFLOW and "slower" in choice.why


def test_exact_gelu_is_converted(converted):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(4, 3, activation=lambda x: keras.ops.gelu(x, approximate=False), name="block_1")(inputs)
    x = keras.layers.Dense(3, name="block_2")(keras.layers.GlobalAveragePooling2D(name="pool")(x))
    _, choice = converted(prefix_of(1, lambda: around(keras.Model(inputs, x, name="gelu_backbone"))))
    assert choice.engine == ONNXRUNTIME


def test_a_choice_goes_through_json():
    choice = EngineChoice(ONNXRUNTIME, "why", 2.0, 1.0, 0.5)
    assert EngineChoice(**choice.to_dict()) == choice

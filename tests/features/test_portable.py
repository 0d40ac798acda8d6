"""Engines in other processes, and several as one: the same numbers, each image once."""

import numpy as np
import pytest
from small_networks import around, norm_model, pictures, skip_backbone

from tfxfer.features.cache import FeatureCache
from tfxfer.features.convert import convert_graph
from tfxfer.features.cut import cut_model
from tfxfer.features.engines import ONNXRUNTIME, TENSORFLOW, EngineChoice, Engines, OnnxPrefix
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.features.portable import pack, unpack
from tfxfer.features.reuse import Decision, Features

IMAGES = pictures(25)
CHOICES = {name: EngineChoice(name, "As the test wants it.") for name in (TENSORFLOW, ONNXRUNTIME)}


def skip_model():
    return around(skip_backbone())


@pytest.mark.parametrize("make", [norm_model, skip_model])
@pytest.mark.parametrize("engine", CHOICES)
def test_an_engine_that_was_sent_computes_the_same_bits(make, engine):
    prefix = FrozenPrefix(cut_model(make(), 2), 8)
    own = prefix if engine == TENSORFLOW else OnnxPrefix(8, convert_graph(prefix.function))
    sent = unpack(*pack(own))
    for count in (8, 3):
        for ours, theirs in zip(own(IMAGES[:count]), sent(IMAGES[:count]), strict=True):
            assert len(theirs) == count
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_image_is_computed_once_whatever_the_number_of_engines(tmp_path, count):
    prefix = FrozenPrefix(cut_model(norm_model(), 1), 4)
    seen: list[list[np.ndarray]] = [[] for _ in range(count)]

    def copies(engine):
        def noting(own):
            return lambda images: (seen[own].append(images.copy()), engine(images))[1]

        return [noting(own) for own in range(count)]

    cache = FeatureCache(tmp_path, "50MB")
    features = Features(Engines(prefix, cache=cache, copies=copies), (IMAGES[:11], IMAGES[11:]), "mirror", cache=cache)
    found, _ = features.compute(Decision("not kept", "As the test wants it.", engine=CHOICES[TENSORFLOW]))
    one = extract(prefix, (IMAGES,), ("mirror",))
    np.testing.assert_array_equal(found.features, one.features)
    np.testing.assert_array_equal(found.activations[0, :], one.activations[0, :])
    images = np.concatenate([batch for own in seen for batch in own])
    assert len(images) == 25 and max(map(len, (batch for own in seen for batch in own))) <= 4
    assert {image.tobytes() for image in images} == {image.tobytes() for image in IMAGES[:, :, ::-1]}
    shares = [sum(map(len, own)) for own in seen]
    assert max(shares) - min(shares) <= 4

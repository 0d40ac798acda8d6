"""The real networks compute what the torch reference implementations compute (stored by make_references.py)."""

import os
from pathlib import Path

import keras
import numpy as np
import pytest
from make_references import REFERENCES, SIZES_PX, reference_images
from PIL import Image

from tfxfer.sources.catalog import class_names_of, get_source, list_sources, load_backbone

DATA = Path(os.environ.get("TFXFER_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
SOURCES = tuple(f"{architecture}_imagenet" for architecture in REFERENCES)


def normalised(source, images):
    return images.astype("float32") * np.float32(source.scale) + np.float32(source.offset)


@pytest.mark.parametrize(
    ("name", "size_px"), [(f"{name}_imagenet", size_px) for name, sizes in SIZES_PX.items() for size_px in sizes]
)
def test_features_and_logits_agree_with_torch(name, size_px):
    pytest.importorskip(get_source(name).weights["package"])
    source = get_source(name)
    model = load_backbone(source, image_size=size_px, include_top=True)
    both = keras.Model(model.input, [model.get_layer("top_pool").output, model.output])
    features, logits = (np.array(out) for out in both(normalised(source, reference_images(size_px)), training=False))
    with np.load(Path(__file__).parent / f"reference_{source.architecture}.npz") as stored:
        assert np.abs(stored[f"logits_{size_px}"]).max() > 0.4  # the values compared are no zeros
        np.testing.assert_allclose(features, stored[f"features_{size_px}"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(logits, stored[f"logits_{size_px}"], rtol=0, atol=1e-4)


def test_the_backbone_gives_the_features_below_the_old_output():
    source = get_source("efficientnet_lite0_imagenet")
    features = np.array(load_backbone(source, image_size=32)(normalised(source, reference_images(32)), training=False))
    with np.load(Path(__file__).parent / "reference_efficientnet_lite0.npz") as stored:
        np.testing.assert_allclose(features, stored["features_32"], rtol=0, atol=1e-4)


def test_references_exist_for_every_torch_source():
    found = {card.architecture for card in list_sources() if card.kind == "torch_checkpoint"}
    assert found == set(REFERENCES) == set(SIZES_PX)


@pytest.mark.parametrize("name", SOURCES)
def test_real_photos_get_their_imagenet_classes(name):
    """Scale, offset and the order of the names, seen on photos: most shoes are one of ImageNet's shoes."""
    pytest.importorskip(get_source(name).weights["package"])
    folder = DATA / "clothing" / "test" / "shoes"
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}")
    source = get_source(name)
    size_px = source.image_size_px
    photos = [Image.open(path).convert("RGB").resize((size_px, size_px)) for path in sorted(folder.iterdir())[:16]]
    images = np.stack([np.asarray(photo) for photo in photos])
    model = load_backbone(source, include_top=True)
    logits = np.array(model(normalised(source, images), training=False))
    names = [class_names_of(source)[index] for index in logits.argmax(axis=1)]
    shoes = {"sneaker", "slip-on shoe", "clogs", "sandal", "cowboy boot", "shoe store"}
    assert sum(found in shoes for found in names) >= 12, names

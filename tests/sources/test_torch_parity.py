"""The networks against torch itself, on images that are stored nowhere; needs torch, see make_references.py."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from make_references import REFERENCES, SIZES_PX, reference_images  # noqa: E402

from tfxfer.sources.catalog import get_source, load_backbone  # noqa: E402

NEEDED = {name: "torchvision" if name == "mobilenet_v2" else "efficientnet_lite_pytorch" for name in REFERENCES}


@pytest.mark.parametrize("name", [f"{architecture}_imagenet" for architecture in sorted(REFERENCES)])
def test_networks_agree_with_torch(name):
    source = get_source(name)
    pytest.importorskip(NEEDED[source.architecture])
    pytest.importorskip(source.weights["package"])
    for size_px in (64, 129):
        images = np.random.default_rng(size_px).integers(0, 256, (4, size_px, size_px, 3), dtype=np.uint8)
        features, logits = REFERENCES[source.architecture](images)
        normalised = images.astype("float32") * np.float32(source.scale) + np.float32(source.offset)
        ours = load_backbone(source, image_size=size_px).predict(normalised, verbose=0)
        np.testing.assert_allclose(ours, features, rtol=0, atol=1e-4)
        ours = load_backbone(source, image_size=size_px, include_top=True).predict(normalised, verbose=0)
        np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-4)
        print(f"{name} {size_px} px: largest difference of logits {np.abs(ours - logits).max():.1e}")


@pytest.mark.parametrize("architecture", sorted(REFERENCES))
def test_stored_references_are_what_torch_computes(architecture):
    pytest.importorskip(NEEDED[architecture])
    pytest.importorskip(get_source(f"{architecture}_imagenet").weights["package"])
    with np.load(Path(__file__).parent / f"reference_{architecture}.npz") as stored:
        for size_px in SIZES_PX[architecture]:
            features, logits = REFERENCES[architecture](reference_images(size_px))
            np.testing.assert_allclose(stored[f"features_{size_px}"], features, rtol=0, atol=2e-5)
            np.testing.assert_allclose(stored[f"logits_{size_px}"], logits, rtol=0, atol=2e-5)

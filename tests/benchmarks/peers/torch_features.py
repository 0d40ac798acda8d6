"""The cached peer in torch: timm's features once, then scikit-learn's LogisticRegression, C chosen by validation.

    PEERS/torch/bin/python tests/benchmarks/peers/torch_features.py DATA OUT --seed 0

With the strength chosen, it is fitted again on train and val together.
"""

import sys

import torch_first  # isort: skip

import joblib
import numpy as np
import torch
import torch_parts
from peer import Clock, arguments, leave, list_images
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

STRENGTHS = np.logspace(-5, 1, 13)
assert torch_first


@torch.inference_mode()
def extract(model, folder, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 1280) and labels."""
    transform = create_transform(
        size_px, crop_pct=1.0, crop_mode="squash", interpolation="bilinear",
        mean=torch_parts.MEAN, std=torch_parts.DEVIATION,
    )  # fmt: skip
    batches = DataLoader(ImageFolder(str(folder), transform), 32)
    found = [(model(images.to(memory_format=torch.channels_last)), labels) for images, labels in batches]
    return torch.cat([x for x, _ in found]).numpy(), torch.cat([y for _, y in found]).numpy()


def main() -> int:
    options = arguments(__doc__, image_size_px=224)
    clock = Clock(options.cpu_seconds)
    clock.mark("imports")
    model = torch_parts.load_model(0).eval()
    x_train, y_train = extract(model, options.data / "train", options.image_size)
    x_val, y_val = extract(model, options.data / "val", options.image_size)

    def fitted(strength: float, x: np.ndarray, y: np.ndarray):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300)).fit(x, y)

    losses = [log_loss(y_val, fitted(c, x_train, y_train).predict_proba(x_val)) for c in STRENGTHS]
    strength = float(STRENGTHS[int(np.argmin(losses))])
    head = fitted(strength, np.concatenate([x_train, x_val]), np.concatenate([y_train, y_val]))
    joblib.dump(head, options.out / "head.joblib")
    clock.mark("model")

    files, _, names = list_images(options.data / "test")
    x_test, _ = extract(model, options.data / "test", options.image_size)
    paths = [f"{file.parent.name}/{file.name}" for file in files]
    settings = {"image_size": options.image_size, "C": strength}
    leave(options.out, clock, settings, paths, names, head.predict_proba(x_test))
    return 0


if __name__ == "__main__":
    sys.exit(main())

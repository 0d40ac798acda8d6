"""fastai's `fine_tune` with torchvision's MobileNetV2.

    PEERS/torch/bin/python tests/benchmarks/peers/fastai_finetune.py DATA OUT --seed 0

As its tutorials write it: `vision_learner`, `aug_transforms`, the head for an epoch (three where images are few), then
all layers by one cycle with discriminative rates; the last epoch is kept.
"""

import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch_first  # isort: skip

import torch_parts
from fastai.vision.all import (
    Callback,
    CancelFitException,
    ImageDataLoaders,
    Resize,
    ResizeMethod,
    accuracy,
    aug_transforms,
    default_split,
    imagenet_stats,
    model_meta,
    set_seed,
    vision_learner,
)
from peer import Clock, arguments, leave, list_images, num_epochs
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

warnings.filterwarnings("ignore")
assert torch_first

# fastai looks for a pooling layer to cut at, and this network pools by a function.
model_meta[mobilenet_v2] = {"cut": lambda model: model.features, "split": default_split, "stats": imagenet_stats}


class Cut(Callback):
    """Stops training when the clock is over."""

    def __init__(self, clock):
        self.clock = clock

    def after_batch(self):
        if self.training and self.clock.over():
            raise CancelFitException


def main() -> int:
    options = arguments(__doc__, image_size_px=160)
    clock = Clock(options.cpu_seconds)
    clock.mark("imports")
    # torchvision takes its weights from here, as if it had downloaded them.
    home = Path(tempfile.mkdtemp(prefix="torch_home_"))
    os.environ["TORCH_HOME"] = str(home)
    checkpoints = home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / torch_parts.weights_file().name).symlink_to(torch_parts.weights_file())
    set_seed(options.seed, reproducible=True)
    num_images = len(list_images(options.data / "train")[0])
    batch_size = 32 if num_images >= 320 else 16
    dls = ImageDataLoaders.from_folder(
        options.data, train="train", valid="val", bs=batch_size, num_workers=0, seed=options.seed,
        item_tfms=Resize(options.image_size, method=ResizeMethod.Squish), batch_tfms=aug_transforms(),
    )  # fmt: skip
    learner = vision_learner(
        dls, mobilenet_v2, weights=MobileNet_V2_Weights.IMAGENET1K_V1, metrics=accuracy, path=options.out
    )
    epochs = num_epochs(num_images, options.epochs_scale)
    with learner.no_bar():
        learner.fine_tune(epochs, freeze_epochs=1 if num_images >= 320 else 3, cbs=Cut(clock))
    learner.export("model.pkl")
    clock.mark("model")

    files = list_images(options.data / "test")[0]
    with learner.no_bar():
        probabilities, _ = learner.get_preds(dl=dls.test_dl(files))
    paths = [f"{file.parent.name}/{file.name}" for file in files]
    settings = {"image_size": options.image_size, "epochs": epochs, "batch_size": batch_size}
    leave(options.out, clock, settings, paths, list(dls.vocab), probabilities.numpy())
    shutil.rmtree(home, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuning as timm does it, in torch: all layers, AdamW with layer decay, warm-up and cosine, channels last.

    PEERS/torch/bin/python tests/benchmarks/peers/timm_finetune.py DATA OUT --seed 0

Crops of at least half the image, mirrored; label smoothing; averaged weights; the best epoch by validation is kept.
"""

import sys

import torch_first  # isort: skip

import numpy as np
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch_parts
from peer import Clock, arguments, leave, list_images, num_epochs
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

RATE, LAYER_DECAY, WEIGHT_DECAY = 1e-3, 0.75, 0.05
assert torch_first


def loader(folder, size_px: int, batch_size: int, *, training: bool) -> DataLoader:
    stats = {"mean": torch_parts.MEAN, "std": torch_parts.DEVIATION, "interpolation": "bilinear"}
    if training:
        transform = create_transform(size_px, is_training=True, scale=(0.5, 1.0), color_jitter=0.2, **stats)
    else:
        transform = create_transform(size_px, crop_pct=1.0, crop_mode="squash", **stats)
    return DataLoader(ImageFolder(str(folder), transform), batch_size, shuffle=training, drop_last=False)


@torch.inference_mode()
def predict(model, batches) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels."""
    model.eval()
    found = [(model(x.to(memory_format=torch.channels_last)).softmax(1), y) for x, y in batches]
    return torch.cat([x for x, _ in found]).numpy(), torch.cat([y for _, y in found]).numpy()


def main() -> int:
    options = arguments(__doc__, image_size_px=160)
    clock = Clock(options.cpu_seconds)
    clock.mark("imports")
    timm.utils.random_seed(options.seed)
    num_images = len(list_images(options.data / "train")[0])
    batch_size = 32 if num_images >= 320 else 16
    train = loader(options.data / "train", options.image_size, batch_size, training=True)
    val = loader(options.data / "val", options.image_size, 32, training=False)
    model = torch_parts.load_model(len(train.dataset.classes), drop_rate=0.2)
    average = timm.utils.ModelEmaV3(model, decay=0.98, use_warmup=True)
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="adamw", lr=RATE, weight_decay=WEIGHT_DECAY, layer_decay=LAYER_DECAY
    )
    epochs = num_epochs(num_images, options.epochs_scale)
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=epochs * len(train), lr_min=1e-6, warmup_t=len(train), warmup_lr_init=RATE / 100
    )
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    best, kept, step = -1.0, None, 0
    for epoch in range(epochs):
        model.train()
        for images, labels in train:
            schedule.step(step)
            if len(labels) > 1:  # BatchNorm cannot train on a last batch of one
                optimizer.zero_grad()
                loss_of(model(images.to(memory_format=torch.channels_last)), labels).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                average.update(model, step)
            step += 1
            if clock.over():
                break
        for one in (model, average.module):
            probabilities, labels = predict(one, val)
            # Accuracy first; among equals the later one, whose rate is lower.
            if (score := float((probabilities.argmax(1) == labels).mean())) >= best:
                best, kept = score, {name: value.clone() for name, value in one.state_dict().items()}
        print(f"epoch {epoch}: {best:.4f}", file=sys.stderr)
        if clock.over():
            break
    torch.save(kept, options.out / "model.pth")
    clock.mark("model")

    model.load_state_dict(torch.load(options.out / "model.pth", weights_only=True))
    test = loader(options.data / "test", options.image_size, 32, training=False)
    probabilities, _ = predict(model, test)
    files = list_images(options.data / "test")[0]
    paths = [f"{file.parent.name}/{file.name}" for file in files]
    settings = {"image_size": options.image_size, "epochs": epochs, "batch_size": batch_size, "validation": best}
    leave(options.out, clock, settings, paths, test.dataset.classes, probabilities)
    return 0


if __name__ == "__main__":
    sys.exit(main())

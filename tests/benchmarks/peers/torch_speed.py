"""torch, channels last, for throughput.py: the forward pass, and a step of the whole network."""

import sys

import torch_first  # isort: skip

import numpy as np
import timm
import torch
import torch_parts
from speed import in_batches, repeated, serve

# Weights do not change the speed; only MobileNetV2's are here.
NAMES = {"mobilenet_v2_imagenet": "mobilenetv2_100", "efficientnet_lite0_imagenet": "efficientnet_lite0"}
NUM_CLASSES = 10
assert torch_first


def make(told):
    torch.manual_seed(0)
    torch.set_num_threads(told["threads"])
    pixels = torch.from_numpy(np.load(told["pixels"])).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (torch_parts.MEAN, torch_parts.DEVIATION))
    images = ((pixels - mean) / deviation).contiguous(memory_format=torch.channels_last)
    work = {"forward": forward, "step": train}[told["arm"]](told, images)
    return work, {"torch": torch.__version__, "timm": timm.__version__}


def forward(told, images):
    model = timm.create_model(NAMES[told["source"]], num_classes=0).eval().to(memory_format=torch.channels_last)
    batches = in_batches(images, told["batch_size"])
    at = 0

    @torch.inference_mode()
    def step() -> int:
        nonlocal at
        model(batches[at % len(batches)]).numpy()
        at += 1
        return told["batch_size"]

    return repeated(step)


def train(told, images):
    model = torch_parts.load_model(NUM_CLASSES, drop_rate=0.2).train()
    if told["batch_norm"] == "frozen":
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval().requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5, weight_decay=0.01, fused=True)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    labels = torch.arange(len(images)) % NUM_CLASSES
    generator = torch.Generator().manual_seed(0)

    def step() -> int:
        rows = torch.randint(len(images), (told["batch_size"],), generator=generator)
        optimizer.zero_grad()
        loss = loss_of(model(images[rows].contiguous(memory_format=torch.channels_last)), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        loss.item()
        return told["batch_size"]

    return repeated(step)


if __name__ == "__main__":
    sys.exit(serve(make))

"""tfxfer's own part of throughput.py: extraction from files and from decoded pixels, and its training step.

It answers as the scripts in peers/ do. Its step is the one that training takes, with the reading of its batches.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.append(str(Path(__file__).parent / "peers"))

import keras
import numpy as np
from speed import BatchTimes, now, serve, since

from tfxfer.data.pixels import PixelRows
from tfxfer.features.convert import convert_graph
from tfxfer.features.cut import cut_model
from tfxfer.features.engines import Engines, sample_of
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.model.blocks import list_blocks
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze, leading_blocks
from tfxfer.runtime.store import RowStore
from tfxfer.specs import Stage
from tfxfer.train.loop import SuffixTrainer

NUM_CLASSES = 10
MANY = 100_000  # images that pay for converting, as more epochs and later runs do


def make(told):
    keras.utils.set_random_seed(0)
    return {"files": extraction, "decoded": extraction, "step": training}[told["arm"]](told)


def extraction(told):
    """Features from the whole network: the frozen prefix is everything but the head."""
    model = build_model(told["source"], NUM_CLASSES, image_size=told["image_size"])
    freeze(model, "all", batch_norm="frozen")
    prefix = FrozenPrefix(cut_model(model, len(list_blocks(model))), told["batch_size"])
    if told.get("export"):
        Path(told["export"]).write_bytes(convert_graph(prefix.function))
    files = [Path(file) for file in told["files"]]

    def waiting() -> PixelRows:
        return PixelRows.of_contents(files, [str(file) for file in files], told["image_size"])

    decoded = waiting()
    decoded[:]
    engines = Engines(prefix)
    choice = engines.choose(sample_of([decoded], prefix.batch_size), MANY)

    def work(_: float):
        rows = decoded if told["arm"] == "decoded" else waiting()
        began = now()
        extract(prefix, [rows], engine=engines.engine())
        return len(files), *since(began)

    work(0.0)
    return work, {
        "engine": choice.engine, "build_seconds": prefix.build_seconds, "conversion_seconds": choice.conversion_seconds
    }  # fmt: skip


def training(told):
    """The suffix behind a cut at the freeze depth, or behind the input alone (without the cache)."""
    pixels = np.load(told["pixels"])
    model = build_model(told["source"], NUM_CLASSES, image_size=told["image_size"])
    depth = told["freeze_depth"]
    freeze(model, depth, batch_norm=told["batch_norm"])
    cut = cut_model(model, leading_blocks(model, depth) if told["cached"] else 0)
    extracted = extract(FrozenPrefix(cut), [RowStore.of_array(pixels)])
    stage = Stage("step", learning_rates=(1e-5,), batch_norm=told["batch_norm"])
    labels, size = np.arange(len(pixels)) % NUM_CLASSES, told["batch_size"]
    trainer = SuffixTrainer(cut.suffix, extracted, labels, np.ones(len(pixels)), stage, size)
    rows, times = np.arange(len(pixels)), BatchTimes(size)

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = times.end_of_batch()

    def work(wanted: float):
        times.begin(wanted)
        trainer.run(rows, 1e-5, epochs=10_000, watch=[Note()])
        return times.found()

    work(0.0)
    shapes = [list(shape) for shape in extracted.activations.shapes]
    return work, {"activation_shapes": shapes, "bytes_an_image": extracted.activations.nbytes // len(pixels)}


if __name__ == "__main__":
    sys.exit(serve(make))

"""A search over freeze depth as KerasTuner's users write it: every trial runs all blocks on all images, each epoch.

    python tests/benchmarks/peers/keras_tuner_plain.py DATA OUT --seed 0 --depths 0,6,12,18 --epochs 7

The depths are those of `tfxfer search`: leading blocks of MobileNetV2 by the names of their layers. AdamW with warm-up
and cosine, label smoothing, BatchNorm held, decoded images in memory.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_fit
import keras_parts
import keras_tuner
from peer import Clock

import tfxfer

PEAK = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--depths", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    options = parser.parse_args()
    clock = Clock(float("inf"))
    clock.mark("imports")
    keras.utils.set_random_seed(options.seed)
    train, steps, num_classes = keras_fit.read(options.data / "train", options.image_size, options.seed)
    val, _, _ = keras_fit.read(options.data / "val", options.image_size)
    blocks = tfxfer.get_source(keras_parts.SOURCE).blocks

    def build(hp: keras_tuner.HyperParameters) -> keras.Model:
        depth = hp.Choice("freeze_depth", [int(depth) for depth in options.depths.split(",")])
        base = keras_parts.load_base(options.image_size)
        frozen = blocks[:depth]
        for layer in base.layers:
            of_frozen = any(layer.name == name or layer.name.startswith(f"{name}_") for name in frozen)
            layer.trainable = not (of_frozen or isinstance(layer, keras.layers.BatchNormalization))
        model = keras_parts.build(base, [], num_classes)
        keras_fit.compile_for(model, PEAK, steps * options.epochs)
        return model

    tuner = keras_tuner.GridSearch(
        build, "val_accuracy", max_trials=len(options.depths.split(",")), directory=options.out, project_name="plain",
        seed=options.seed,
    )  # fmt: skip
    began = time.perf_counter()
    tuner.search(train, validation_data=val, epochs=options.epochs, verbose=0)
    whole = time.perf_counter() - began
    best = tuner.oracle.get_best_trials(1)[0]
    told = {
        "seconds": whole, "trials": len(tuner.oracle.trials), "score": best.score,
        "freeze_depth": best.hyperparameters.values["freeze_depth"], "marks": clock.marks,
        "scores": {trial.hyperparameters.values["freeze_depth"]: trial.score for trial in tuner.oracle.trials.values()},
        "ends": clock.now(),
    }  # fmt: skip
    (options.out / "plain.json").write_text(json.dumps(told), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

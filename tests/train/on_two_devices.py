"""What test_distribute.py runs on several logical devices, which must be made before TensorFlow begins."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import test_loop
from small_networks import around, norm_model, skip_backbone
from test_forgetting import HEAD
from test_loop import HELD, IMAGES, LABELS, ROWS, STAGE, WEIGHTS

from tfxfer.errors import TfxferError
from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix, extract
from tfxfer.methods.optimizers import blockwise_factors
from tfxfer.model.freeze import freeze
from tfxfer.train.distribute import Devices, choose_devices
from tfxfer.train.forgetting import make_regularizer
from tfxfer.train.loop import SuffixTrainer

CASES = {
    "l2_sp, average, mixup": ({"average": 0.8, "mixup": 0.4, "regularizer": "l2_sp"}, {}),
    "lwf, in parts, by blocks": ({"batch_norm": "frozen", "micro_batches": 2, "regularizer": "lwf"}, {"decay": 0.5}),
    "batch_norm trains, one image over": ({"batch_norm": "train"}, {"batch_size": 15}),
    "in bfloat16": ({"batch_norm": "frozen"}, {"precision": "bfloat16"}),
    "two tensors cross, clipped": ({"batch_norm": "frozen", "clip_norm": 0.01, "solver": "sgd"}, {"skip": True}),
}


def trained(devices, options, *, batch_size=8, decay=None, skip=False, dropout=0.0, held=HELD, precision=None):
    stage = dataclasses.replace(STAGE, **options)
    devices = dataclasses.replace(devices, precision=precision or devices.precision)
    model = around(skip_backbone(), dropout=dropout) if skip else norm_model(dropout=dropout)
    depth = 2 if skip else 1
    freeze(model, depth, batch_norm=stage.batch_norm)
    cut = cut_model(model, depth)
    extracted = extract(FrozenPrefix(cut, 8), (IMAGES,))
    weights = {id(variable): variable.numpy() for variable in cut.suffix.weights}
    trainer = SuffixTrainer(
        cut.suffix, extracted, LABELS, WEIGHTS, stage, batch_size, devices=devices,
        factors=blockwise_factors(model, decay) if decay else None,
        regularizer=make_regularizer(stage, model, weights, HEAD, extracted, LABELS),
    )  # fmt: skip
    before = {variable.path: variable.numpy() for variable in model.variables}
    run = trainer.run(ROWS, 3e-3, held=held, seed=7)
    moved = max(float(np.abs(v.numpy() - before[v.path]).max()) for v in model.variables if "seed" not in v.path)
    return trainer, run, moved


def apart(one, other) -> dict:
    weights = max(float(np.abs(a - b).max()) for a, b in zip(one.weights, other.weights, strict=True))
    losses = [
        abs(a[key] - b[key]) for a, b in zip(one.history, other.history, strict=True) for key in ("loss", "val_loss")
    ]
    return {"weights": weights, "losses": max(losses), "epochs": len(losses)}


def main() -> dict:
    devices = choose_devices("mirrored")
    found = {"devices": devices.describe()}
    for name, (options, more) in CASES.items():
        many, one = trained(devices, options, **more), trained(Devices(), options, **more)
        found[name] = {**apart(many[1], one[1]), "moved": many[2]}
    trainer, run, _ = trained(devices, {}, dropout=0.5)
    again = trainer.run(ROWS, 3e-3, held=HELD, seed=7)
    found["dropout"] = {
        "again": apart(run, again)["weights"],
        "from one device": apart(run, trained(Devices(), {}, dropout=0.5)[1])["weights"],
        "seeds": [
            [part.numpy().tolist() for part in devices.strategy.experimental_local_results(variable.value)]
            for variable in trainer.step._replicas.variables
            if "seed" in variable.path
        ],
    }
    test_loop.ready = functools.partial(test_loop.ready, devices=devices)
    _, trainer = test_loop.ready(STAGE, dropout=0.3, views=("plain", "mirror"))
    whole = trainer.run(ROWS, 3e-3, seed=7, held=HELD)
    with tempfile.TemporaryDirectory() as folder:
        found["resumed"] = apart(test_loop.resumed(Path(folder), 3, held=HELD)[0], whole)
    first, *_ = trainer.step._replicas.variables
    devices.strategy.experimental_local_results(first.value)[1].assign_add(np.full(first.shape, 1e-6, np.float32))
    for name, what in {"unlike": trainer.step.check}.items():
        try:
            what()
        except TfxferError as error:
            found[name] = str(error)
    return found


def tell() -> None:
    print(json.dumps(main()))

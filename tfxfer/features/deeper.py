"""From one cut to a deeper one: what crosses the first is taken on, so that a stage that freezes more computes less."""

import keras
import numpy as np
import tensorflow as tf

from tfxfer.features.activations import Activations
from tfxfer.features.cut import Cut, cut_model, middle_of
from tfxfer.features.extract import Extracted
from tfxfer.features.fresh import FreshViews
from tfxfer.runtime.store import RowStore

BATCH = 64


def go_deeper(model: keras.Model, cut: Cut, depth: int, extracted: Extracted) -> tuple[Cut, Extracted] | None:
    """Cut a model deeper than before, and compute what crosses there from what crossed before.

    Args:
        model: Of `build_model`, whose blocks up to `depth` are as they were when `extracted` was computed.
        cut: The first cut.
        depth: Of the second.
        extracted: What crosses the first, in all views.

    Returns:
        The second cut, and what crosses it in the same views; None where it is no deeper, cannot be made, or views are
        made anew in each epoch.
    """
    if depth <= cut.depth or isinstance(extracted.activations, FreshViews):
        return None
    deeper = cut_model(model, depth)
    middle = middle_of(model, cut.depth, depth)
    if deeper is None or middle is None:
        return None
    compute = tf.function(middle, autograph=False, reduce_retracing=True)
    shapes = [tuple(tensor.shape[1:]) for tensor in deeper.suffix.inputs]
    before, count = extracted.activations, extracted.activations.num_images
    views = []
    for view in range(len(before)):
        stores = [RowStore.temporary((count, *shape), "float32") for shape in shapes]
        for start in range(0, count, BATCH):
            rows = np.arange(start, min(start + BATCH, count))
            for store, values in zip(
                stores, compute(tf.nest.map_structure(tf.constant, before[view, rows])), strict=True
            ):
                store.write(start, values.numpy())
        views.append(stores)
    return deeper, Extracted(Activations(views), extracted.features, extracted.views, extracted.images_per_second)

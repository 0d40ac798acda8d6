"""Reopen a SavedModel as a serving engine would: TensorFlow alone, no Keras code, no tfxfer. See reopen.py."""

import numpy as np

ABSENT = ("tfxfer", "keras")


def import_runtime():
    import tensorflow as tf

    return tf


def open_artifact(tf, path):
    loaded = tf.saved_model.load(path)
    described = loaded.signatures["metadata"]()

    def predict(signature, argument, dtype):
        def run(batch):
            outputs = loaded.signatures[signature](**{argument: tf.constant(batch, dtype)})
            classes = [label.decode() for label in outputs["classes"].numpy()]
            return outputs["probabilities"].numpy(), np.array(classes)

        return run

    return (
        f"tensorflow {tf.__version__}",
        [label.decode() for label in described["class_names"].numpy()],
        {
            "images": predict("serving_default", "images", tf.uint8),
            "bytes": predict("serve_bytes", "image_bytes", tf.string),
        },
    )

"""TensorFlow SavedModel: the format of TensorFlow Serving, Vertex AI, SageMaker and `tf.saved_model.load`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import tensorflow as tf

from tfxfer.exporters.serving import channels_of, facts, probabilities_of, servable
from tfxfer.features.convert import quiet_converters
from tfxfer.model.preprocess import AdaptImage

ARTIFACT = Path("saved_model/1")  # TensorFlow Serving wants a folder of numbered versions
METADATA_FILE = Path("assets.extra/metadata.json")


def export_saved_model(
    model: keras.Model, folder: Path, *, class_names: Sequence[str], metadata: Mapping[str, str]
) -> Path:
    """Write `folder/saved_model/1`.

    Signatures: `serving_default` (images: uint8 (N, H, W, C)) and, for images of three channels, `serve_bytes`
    (image_bytes: N encoded JPEG or PNG files of any sizes), both to `probabilities` float32 (N, K) and `classes` string
    (N); and `metadata`, without an input, to `class_names` string (K) and `metadata`, a JSON object, which also lies in
    assets.extra/metadata.json.

    Args:
        model: Images (N, H, W, C) in 0..255 to probabilities (N, K).
        folder: Where exports go; made if missing.
        class_names: K names, in the order of the outputs.
        metadata: Further facts, text to text.

    Returns:
        The artifact's path relative to `folder`.

    Raises:
        InputError: Where the model's input is not an image.
    """
    served, size_px = servable(model)
    about = facts(size_px, class_names, metadata, channels_of(served))
    module = tf.Module()
    module.weights = [variable.value for variable in served.variables]
    # Tables inside a loaded program (TF Hub), which are no weights.
    module.resources = [part for layer in served._flatten_layers() for part in getattr(layer, "resources", ())]
    target = Path(folder) / ARTIFACT
    with quiet_converters():
        signatures = _signatures(served, size_px, class_names, json.dumps(about, ensure_ascii=False))
        tf.saved_model.save(module, str(target), signatures=signatures)
    (target / METADATA_FILE).parent.mkdir()
    (target / METADATA_FILE).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return ARTIFACT


def _signatures(model: keras.Model, size_px: int, class_names: Sequence[str], about: str) -> dict:
    names = list(class_names)
    adapt = AdaptImage(size_px)

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = probabilities_of(model, images)
        classes = tf.gather(tf.constant(names), tf.argmax(probabilities, axis=1))
        return {"probabilities": probabilities, "classes": classes}

    @tf.function(
        autograph=False,
        input_signature=[tf.TensorSpec((None, None, None, channels_of(model)), tf.uint8, name="images")],
    )
    def serve_images(images):
        return outputs(images)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec((None,), tf.string, name="image_bytes")])
    def serve_bytes(image_bytes):
        spec = tf.TensorSpec((size_px, size_px, 3), tf.float32)
        return outputs(tf.map_fn(lambda one: adapt(_decode(one)[None])[0], image_bytes, fn_output_signature=spec))

    @tf.function(autograph=False, input_signature=[])
    def describe():
        return {"class_names": tf.constant(names), "metadata": tf.constant(about)}

    found = {"serving_default": serve_images, "serve_bytes": serve_bytes, "metadata": describe}
    return found if channels_of(model) == 3 else {name: found[name] for name in ("serving_default", "metadata")}


def _decode(content: tf.Tensor) -> tf.Tensor:
    """One encoded file to float32 RGB (H, W, 3), as `tfxfer.runtime.images` decodes it, EXIF orientation aside."""

    def jpeg():
        # These two settings make the pixels those of Pillow; the defaults are up to 4 levels away.
        pixels = tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE", fancy_upscaling=True)
        return tf.cast(pixels, tf.float32)

    def other():
        pixels = tf.cast(tf.io.decode_png(content, channels=4), tf.float32)
        alpha = pixels[..., 3:] / 255.0
        return tf.floor(pixels[..., :3] * alpha + 255.0 * (1.0 - alpha) + 0.5)

    pixels = tf.cond(tf.io.is_jpeg(content), jpeg, other)
    pixels.set_shape((None, None, 3))
    return pixels

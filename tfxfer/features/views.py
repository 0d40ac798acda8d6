"""Views of images: plain, mirrored, and augmented at random, each image by itself and the same whenever it is made."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfxfer.runtime.images import available_cores

VIEWS = {"plain": lambda images: images, "mirror": lambda images: images[:, :, ::-1]}

NUM_OPERATIONS = 2
MAGNITUDE = 0.3  # 9 of 30, as the paper found for ImageNet
POLICY = 1  # raise it when the same draw gives other pixels
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "auto_contrast", "equalize", "solarize",
    "posterize", "color", "contrast", "brightness", "sharpness",
)  # fmt: skip
# Of float32 images (1, S, S, 3) in 0..255 and a sign; colour has one direction, which is Keras'.
Operation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class RandView:
    """RandAugment and, for every other image, a mirror image.

    What is done to an image depends on the seed, the view's number and the image's own pixels: not on the images beside
    it, their order, or how often it was made before. Two operations of fourteen, each with the same chance, are done at
    9/30 of their largest strength, in a direction drawn. Keras' own `RandAugment` draws the operations once a batch,
    turns by up to 180 degrees and equalises a batch as one image, so its layers are called one by one.

    Args:
        seed: Another seed, other views.
        number: From 1; view 0 is the plain image.

    Example:
        >>> images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
        >>> view = RandView(seed=0, number=1)
        >>> bool((view(images)[2] == view(images[2:3])[0]).all()), view.name
        (True, 'rand 1')

    Reference:
        Cubuk, Zoph, Shlens, Le. RandAugment: Practical Automated Data Augmentation with a Reduced Search Space. NeurIPS
        2020.
    """

    seed: int
    number: int

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, S, S, 3) uint8 to the same."""
        return augmented(images, self.seed, np.full(len(images), self.number))

    @property
    def name(self) -> str:
        """For people."""
        return f"rand {self.number}"

    @property
    def key(self) -> dict[str, Any]:
        """What entries of the feature cache are found by."""
        versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
        return {"rand": POLICY, "seed": self.seed, "number": self.number, **versions}


View = str | RandView  # a name in VIEWS, or one of those without number


def view_function(view: View) -> Callable[[np.ndarray], np.ndarray]:
    """What makes a view of (n, S, S, 3) uint8 images."""
    return VIEWS[view] if isinstance(view, str) else view


def view_name(view: View) -> str:
    """For people."""
    return view if isinstance(view, str) else view.name


def view_key(view: View) -> str | dict[str, Any]:
    """What entries of the feature cache are found by."""
    return view if isinstance(view, str) else view.key


@dataclasses.dataclass(frozen=True)
class Draw:
    """What is done to one image.

    Attributes:
        operations: Two numbers of `OPERATIONS`, in their order.
        signs: Of each, 1 or -1.
        mirrored: Whether it is mirrored first.
    """

    operations: tuple[int, ...]
    signs: tuple[int, ...]
    mirrored: bool


def draw(seed: int, number: int, image: np.ndarray) -> Draw:
    """What a view does to an image (S, S, 3) uint8."""
    content = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
    random = np.random.default_rng([seed, number, *np.frombuffer(content, "<u4").tolist()])
    operations = random.integers(len(OPERATIONS), size=NUM_OPERATIONS)
    signs = 1 - 2 * random.integers(2, size=NUM_OPERATIONS)
    return Draw(tuple(operations.tolist()), tuple(signs.tolist()), bool(random.integers(2)))


def augmented(images: np.ndarray, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Each image in the view of its number.

    Args:
        images: (n, S, S, 3) uint8.
        seed: Of the views.
        numbers: (n,) ints, 0 for the plain image.

    Returns:
        (n, S, S, 3) uint8.
    """
    found = np.array(images)
    chosen = np.flatnonzero(numbers)
    if not len(chosen):
        return found
    draws = [draw(seed, int(numbers[place]), images[place]) for place in chosen]
    changed = [
        images[place, :, ::-1] if made.mirrored else images[place] for place, made in zip(chosen, draws, strict=True)
    ]
    operations = np.array([made.operations for made in draws], np.int32)
    signs = np.array([made.signs for made in draws], np.float32)
    found[chosen] = _graph(images.shape[1:])(np.stack(changed), operations, signs).numpy()
    return found


def _affine(matrix: Callable[[Any, int], list]) -> Operation:
    """Pixel (x, y) of the result is taken from where `matrix` sends it."""

    def move(images: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
        rows = tf.stack([tf.cast(value, tf.float32) for value in [*matrix(sign, images.shape[1]), 0.0, 0.0]])
        return keras.ops.image.affine_transform(images, rows[None], interpolation="bilinear", fill_mode="reflect")

    return move


def _turn(sign: Any, size: int) -> list:
    """By 30 degrees at the full magnitude, around the middle."""
    angle = sign * (MAGNITUDE * np.pi / 6)
    cos, sin, middle = tf.cos(angle), tf.sin(angle), (size - 1) / 2
    return [cos, -sin, middle * (1 - cos + sin), sin, cos, middle * (1 - sin - cos)]


def _layer(layer: keras.Layer, transformation: Callable[[Any], Any] = lambda sign: None) -> Operation:
    """A Keras layer that is told what it would otherwise draw."""
    return lambda images, sign: layer.transform_images(images, transformation(sign))


@functools.cache
def _operations() -> tuple[Operation, ...]:
    """In the order of `OPERATIONS`; made late, since Keras' layers have variables, and these occupy devices."""
    layers, whole = keras.layers, {"seed": 0}
    shear, shift = 0.3 * MAGNITUDE, 0.45 * MAGNITUDE  # 150 of AutoAugment's 331 pixels
    change = 0.9 * MAGNITUDE
    solarized = {"additions": 0.0, "thresholds": 255.0 * (1 - MAGNITUDE)}
    found: dict[str, Operation] = {
        "identity": lambda images, sign: images,
        "shear_x": _affine(lambda sign, size: [1.0, shear * sign, 0.0, 0.0, 1.0, 0.0]),
        "shear_y": _affine(lambda sign, size: [1.0, 0.0, 0.0, shear * sign, 1.0, 0.0]),
        "translate_x": _affine(lambda sign, size: [1.0, 0.0, shift * size * sign, 0.0, 1.0, 0.0]),
        "translate_y": _affine(lambda sign, size: [1.0, 0.0, 0.0, 0.0, 1.0, shift * size * sign]),
        "rotate": _affine(_turn),
        "auto_contrast": _layer(layers.AutoContrast()),
        "equalize": _layer(layers.Equalization()),
        "solarize": _layer(layers.Solarization(**whole), lambda sign: solarized),
        "posterize": _layer(
            layers.RandomPosterization(8, **whole),
            lambda sign: {"shift_factor": tf.constant([round(4 * MAGNITUDE)], tf.uint8)},
        ),
        "color": _layer(layers.RandomColorDegeneration(1.0, **whole), lambda sign: {"factor": change}),
        "contrast": _layer(layers.RandomContrast(1.0, **whole), lambda sign: {"contrast_factor": 1 + change * sign}),
        "brightness": _layer(layers.RandomBrightness(1.0, **whole), lambda sign: {"rgb_delta": 255 * change * sign}),
        "sharpness": _layer(layers.RandomSharpness(1.0, **whole), lambda sign: {"factor": (1 + change * sign) / 2}),
    }
    return tuple(found[name] for name in OPERATIONS)


@functools.cache
def _graph(shape: tuple[int, int, int]) -> Callable:
    """Images, operations and signs to images, one image at a time: batches of another size give the same bits."""

    def one(given: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tf.Tensor:
        image, operations, signs = given
        found = tf.cast(image, tf.float32)[None]
        for turn in range(NUM_OPERATIONS):
            branches = [
                lambda made=made, found=found, turn=turn: tf.ensure_shape(made(found, signs[turn]), (1, *shape))
                for made in _operations()
            ]
            found = tf.switch_case(operations[turn], branches)
        return tf.cast(tf.round(tf.clip_by_value(found[0], 0.0, 255.0)), tf.uint8)

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec((None, *shape), tf.uint8),
            tf.TensorSpec((None, NUM_OPERATIONS), tf.int32),
            tf.TensorSpec((None, NUM_OPERATIONS), tf.float32),
        ],
    )
    def run(images: tf.Tensor, operations: tf.Tensor, signs: tf.Tensor) -> tf.Tensor:
        made = tf.TensorSpec(shape, tf.uint8)
        with tf.device("/CPU:0"):  # beside a step that trains, and of the same bits where there is a GPU
            return tf.map_fn(
                one, (images, operations, signs), fn_output_signature=made, parallel_iterations=available_cores()
            )

    return run

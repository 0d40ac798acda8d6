"""TF Hub modules and any other SavedModel: `hub:FOLDER`, `hub:FILE.tar.gz`, or a handle such as https://tfhub.dev/...

A handle is fetched and kept by the tensorflow_hub library (TFHUB_CACHE_DIR). A SavedModel is a program, so it passes
the gate of `tfxfer.sources.safety` before TensorFlow sees it.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_folder
from tfxfer.sources.hub_anatomy import anatomy_of
from tfxfer.sources.hub_blocks import group_slots
from tfxfer.sources.hub_layer import HubLayer
from tfxfer.sources.hub_outputs import OUTPUTS, TOP_OUTPUTS, classifier_note, outputs_of, pick_output, take_output
from tfxfer.sources.hub_program import Program, reason
from tfxfer.sources.ranges import RANGES, range_facts
from tfxfer.sources.report import LoadReport
from tfxfer.sources.safety import check_saved_model, extract_archive
from tfxfer.specs import Source

IMAGE_SIZE_PX = 224
ARCHIVES = (".tar.gz", ".tgz")
SAVED_MODEL = "saved_model.pb"
SIGNATURES_ONLY = "Signatures only: it can be used as it is, not trained."


def describe(
    spelling: str, reference: str, *, weights: str, input_range: str, partial: bool, trusted: Sequence[str]
) -> Source:
    """The card of a SavedModel, from its graph; see `tfxfer.sources`.

    Pixels are scaled to 0..1, the convention of TF Hub, unless the program takes whole numbers or `input_range` says
    otherwise; the graph itself does not tell. What Keras exported follows no convention, so it must be said there.

    Raises:
        InputError: Where there is none, the gate refuses it, or it does not take images.
    """
    if weights or partial:
        raise InputError(f"{spelling} brings its own weights, all of them; drop --weights and --partial.")
    with resolve(reference) as folder:
        check_saved_model(folder)
        anatomy = anatomy_of(folder)
        answers = classifier_note(outputs_of(folder, anatomy))
        digest = sha256_of_folder(folder)
    side = anatomy.input_shape[1]
    whole = anatomy.input_dtype.startswith(("int", "uint"))
    if anatomy.endpoint == "serve" and not input_range and not whole:
        raise InputError(
            f"{spelling} was exported by Keras, and its graph does not say what pixels it wants; give --input-range: "
            f"{', '.join(RANGES)} (0..255 where the model rescales by itself)."
        )
    blocks = group_slots(anatomy.slots)
    return Source(
        name=spelling,
        kind="hub",
        title=f"SavedModel, {len(anatomy.slots)} variables in {len(blocks)} blocks, called by {anatomy.endpoint}",
        licence="unknown",
        reference=reference,
        weights={"file": reference, "sha256": digest},
        image_size_px=side or IMAGE_SIZE_PX,
        min_image_size_px=side or 1,
        fixed_size=side is not None,
        url=reference if _is_handle(reference) else "",
        # Nothing of a program without __call__ can train, so recipe `auto` freezes all of it.
        fine_tune_depth=len(blocks) if anatomy.is_signature else -1,
        notes=" ".join(filter(None, (SIGNATURES_ONLY if anatomy.is_signature else "", answers))),
        trusted=tuple(trusted),
        **range_facts(input_range or ("0..255" if whole else "0..1")),
    )


def load(card: Source, size_px: int, *, weights: bool, include_top: bool, seed: int) -> tuple[Any, LoadReport | None]:
    """The program as a backbone of one layer; see `tfxfer.sources`.

    With `include_top` the program's own output counts as logits. Without `weights` its variables are made random.

    Raises:
        InputError: Where it changed since it was described, or gives no features for images of this size.
    """
    with resolve(card.reference) as folder:
        program = Program(folder, card.weights.get("sha256", ""))
    outputs = _try(program, size_px, card.name)
    name = pick_output(outputs, TOP_OUTPUTS if include_top else OUTPUTS, card.name)
    found = take_output(outputs, name)
    tail = tuple(int(side) for side in found.shape[1:])
    if len(tail) not in ((1,) if include_top else (1, 3)) or not found.dtype.is_floating:
        raise InputError(
            f"{card.name} gives {found.dtype.name} of shape (N, {', '.join(map(str, tail))}); needed are floats "
            f"{'(N, K)' if include_top else '(N, F) or (N, H, W, F)'}."
        )
    layer = HubLayer(program.anatomy, program.sha256, tail, name, program=program, name="program")
    inputs = keras.Input((size_px, size_px, 3), dtype="float32")
    features = layer(inputs)
    if len(tail) == 3:
        features = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    if not weights:
        layer.randomise(seed)
    return keras.Model(inputs, features, name="hub_backbone"), None


@contextlib.contextmanager
def resolve(reference: str) -> Iterator[Path]:
    """The folder of a SavedModel for as long as the block lasts.

    Args:
        reference: A folder, a .tar.gz (unpacked to a temporary folder), or a handle, which the tensorflow_hub library
            finds in its cache or fetches.

    Raises:
        InputError: Where there is nothing, or a handle can be neither found nor fetched.
    """
    if _is_handle(reference):
        yield _with_model(_fetch(reference), reference)
        return
    path = Path(reference).expanduser()
    if path.is_file() and path.name.endswith(ARCHIVES):
        with tempfile.TemporaryDirectory(prefix="tfxfer-hub-") as folder:
            yield _with_model(extract_archive(path, Path(folder)), reference)
        return
    if "://" in reference:
        raise InputError(f"hub:{reference} is neither a path nor an https:// handle; copy it to a folder first.")
    if not path.is_dir():
        what = "is neither a folder nor a .tar.gz" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; give the folder of a SavedModel, a .tar.gz of it, or an https:// handle.")
    yield _with_model(path, reference)


def _is_handle(reference: str) -> bool:
    return reference.startswith("https://")


def _with_model(folder: Path, reference: str) -> Path:
    """The folder itself, or the only one in it, that holds a SavedModel."""
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())]
    found = [place for place in places if (place / SAVED_MODEL).is_file()]
    if not found:
        raise InputError(f"{reference} holds no {SAVED_MODEL}, so it is no SavedModel of TensorFlow.")
    if found[0] != folder and len(found) > 1:
        raise InputError(f"{reference} holds several SavedModels ({', '.join(p.name for p in found)}); give one.")
    return found[0]


def _fetch(handle: str) -> Path:
    import tensorflow_hub

    try:
        return Path(tensorflow_hub.resolve(handle))
    except Exception as error:  # urllib, tarfile, tensorflow and kagglehub each raise their own
        cache = os.environ.get("TFHUB_CACHE_DIR") or str(Path(tempfile.gettempdir()) / "tfhub_modules")
        raise InputError(
            f"{handle} is not in the cache {cache} (TFHUB_CACHE_DIR) and cannot be fetched ({reason(error)}); "
            "download it where there is a network and give hub:FOLDER or hub:FILE.tar.gz."
        ) from error


def _try(program: Program, size_px: int, name: str) -> Any:
    """Run it twice on copies of an image: the one way to know what comes out at this size, and whether it is always
    the same. What Keras exports of a model with random augmentation inside goes on augmenting."""
    one = np.random.default_rng(0).random((1, size_px, size_px, 3), np.float32)
    copies = tf.constant(np.repeat(one, 8, axis=0))
    try:
        strategy = tf.distribute.get_strategy()  # inside a scope, variables can be read in a replica only
        runs = [strategy.run(lambda images: program(images, training=False), (copies,)) for _ in range(2)]
        first, second = (
            tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], outputs)
            for outputs in runs
        )
    except Exception as error:  # a network too deep for so small an image, a fixed shape, an op that does not exist
        raise InputError(f"{name} cannot compute images of {size_px} px: {reason(error)}") from error
    for a, b in zip(tf.nest.flatten(first), tf.nest.flatten(second), strict=True):
        if a.dtype.is_floating and a.shape.rank and a.shape[0] == 8:
            seen = np.concatenate([a.numpy(), b.numpy()]).astype(np.float64)
            if not np.allclose(
                seen, seen[:1], rtol=1e-3, atol=1e-3 * np.abs(seen).max(initial=0) + 1e-12, equal_nan=True
            ):
                raise InputError(
                    f"{name} gives different numbers for the same image, so something random goes on inside (layers of "
                    "augmentation, most likely); export the model again without it."
                )
    return first

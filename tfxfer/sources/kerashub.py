"""Image backbones of KerasHub: `kerashub:PRESET_OR_PATH`, a preset's folder, a folder as Hugging Face has them, a name.

Needs the extra `[kerashub]`. What the gate passes is read by KerasHub itself; its backbone becomes a functional model
with pooled features, and the numbers of its image converter go into the card.
"""

import importlib.util
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfxfer.errors import InputError
from tfxfer.runtime.files import cache_dir, sha256_of_folder
from tfxfer.sources.fresh import fresh_names_and_seeds
from tfxfer.sources.ranges import RANGES, range_facts
from tfxfer.sources.report import LayerReport, LoadReport
from tfxfer.specs import Source

# Backbones whose weights fit images of any side, and the smallest that all of them can take.
ANY_SIZE = frozenset(
    f"{name}Backbone"
    for name in (
        "CSPNet", "DenseNet", "EfficientNet", "HGNetV2", "MiT", "MobileNet", "MobileNetV5", "ResNet", "VGG", "Xception",
    )
)  # fmt: skip
SMALLEST_PX = 32
# Backbones whose first token stands for the whole image; of others the tokens' mean is taken.
CLASS_TOKEN = frozenset(f"{name}Backbone" for name in ("DINOV2", "DINOV3", "DeiT", "ViT"))
# What a preset is made of; the last two are Hugging Face's.
FILES = (
    "metadata.json",
    "image_converter.json",
    "preprocessor.json",
    "model.weights.h5",
    "preprocessor_config.json",
    "model.safetensors",
)
USUAL_SIZE_PX = 224


def describe(
    spelling: str,
    reference: str,
    *,
    weights: str = "",
    input_range: str = "",
    partial: bool = False,
    trusted: Sequence[str] = (),
) -> Source:
    """The card of a preset; see `tfxfer.sources`.

    Args:
        spelling: As the user wrote it.
        reference: A folder, or what KerasHub takes: a preset's name, kaggle://..., hf://...
        weights: Must be empty: presets have their own.
        input_range: What the network wants pixels scaled to, where the preset has no image converter.
        partial: Must be false: presets are loaded whole.
        trusted: Not used: of a preset only KerasHub's own classes are made.

    Raises:
        InputError: Where KerasHub is missing, the preset is not found or refused, or is no backbone for images.
    """
    if weights or partial:
        raise InputError(f"{spelling!r} has weights of its own and is loaded whole; drop --weights and --partial.")
    _check_installed(spelling)
    folder = _folder_of(spelling, reference)
    kind, config = _backbone_of(spelling, folder)
    shape = config.get("image_shape")
    if not shape or len(shape) != 3 or shape[2] not in (3, None):
        raise InputError(f"{spelling!r} is a {kind}, which takes no RGB images; give a preset for images.")
    converter = _converter_of(folder)
    side = shape[0] or ((converter is not None and converter.image_size) or [0])[0] or USUAL_SIZE_PX
    any_size = kind in ANY_SIZE
    return Source(
        name=spelling,
        kind="kerashub",
        title=f"{kind} of KerasHub, {Path(reference).name}",
        reference=reference,
        architecture=kind,
        licence="unknown",
        url="https://keras.io/keras_hub/presets/",
        weights={"file": str(folder), "sha256": sha256_of_folder(folder)},
        image_size_px=int(side),
        min_image_size_px=min(SMALLEST_PX, int(side)) if any_size else int(side),
        fixed_size=not any_size,
        trusted=("keras_hub",),  # its layers stand in the config of every model made with them
        **_range_of(spelling, folder, converter, input_range),
    )


def load(card: Source, size_px: int, *, weights: bool, include_top: bool, seed: int) -> tuple[Any, LoadReport | None]:
    """Build the backbone and load its weights; see `tfxfer.sources`.

    Raises:
        InputError: Where KerasHub is missing, the folder has changed since the card was made, or does not load.
    """
    if include_top:
        raise InputError(f"{card.name!r} is a backbone: its preset's old output is not loaded.")
    _check_installed(card.name)
    folder = Path(card.weights["file"])
    digest = sha256_of_folder(folder) if folder.is_dir() else "none"
    if digest != card.weights["sha256"]:
        raise InputError(
            f"{folder} has SHA-256 {digest}, but {card.weights['sha256']} was recorded: a file was changed or damaged; "
            "get the preset again."
        )
    from tfxfer.sources.safety import check_model_file

    check_model_file(folder)
    import keras_hub

    options = {"image_shape": (size_px, size_px, 3)} if card.architecture in ANY_SIZE else {}
    with fresh_names_and_seeds(seed):
        try:
            backbone = keras_hub.models.Backbone.from_preset(str(folder), load_weights=weights, **options)
        except Exception as error:  # of a folder that does not hold together
            raise InputError(f"KerasHub cannot load {folder}: {_first_line(error)}") from error
        model = _pooled(card, backbone, size_px)
    if not weights:
        return model, None
    from tfxfer.sources.safety import check_finite

    check_finite(((weight.path, weight) for weight in model.weights), f"The weights in {str(folder)!r}")
    layers = [LayerReport(layer.name, "matched", layer.count_params()) for layer in model.layers if layer.weights]
    return model, LoadReport(str(folder), tuple(layers))


def _check_installed(spelling: str) -> None:
    if importlib.util.find_spec("keras_hub") is None:
        raise InputError(f"{spelling!r} needs KerasHub, which is not installed; run: pip install 'tfxfer[kerashub]'")


def _folder_of(spelling: str, reference: str) -> Path:
    """The preset as a folder that passed the gate; one that has a name is fetched, by KerasHub, into our cache."""
    from tfxfer.sources.safety import check_model_file

    folder = Path(reference)
    if not folder.is_dir():
        if folder.exists() or reference.startswith((".", "/", "~")):
            raise InputError(f"{reference} is no folder; give the folder of a preset, with its config.json.")
        folder = _fetched(spelling, reference)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give the folder that save_to_preset wrote.")
    check_model_file(folder)
    return folder


def _fetched(spelling: str, reference: str) -> Path:
    """A copy of the files of a preset that has a name; caches of others hold links, which the gate refuses."""
    from keras_hub.src.utils.preset_utils import get_file

    home = cache_dir() / "kerashub"
    home.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=home, prefix=".new-"))
    try:
        try:
            _copy(get_file(reference, "config.json"), temporary)
        except Exception as error:  # each of the places has errors of its own
            raise InputError(
                f"The preset {spelling!r} could not be had ({_first_line(error)}); go online, or give the folder of "
                "the preset: kerashub:PATH."
            ) from error
        for name in FILES:
            try:
                _copy(get_file(reference, name), temporary)
            except Exception:  # not every preset has every file; what it cannot do without is seen when it is loaded
                continue
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", reference)
        folder = home / f"{name}-{sha256_of_folder(temporary)[:16]}"
        if not folder.is_dir():
            temporary.rename(folder)
        return folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(file: str, folder: Path) -> None:
    path = Path(file).resolve()
    try:
        os.link(path, folder / Path(file).name)
    except OSError:
        shutil.copyfile(path, folder / Path(file).name)


def _backbone_of(spelling: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Name of the class and arguments of the backbone in a folder."""
    from keras_hub.src.utils.preset_utils import get_preset_loader

    try:
        loader = get_preset_loader(str(folder))
        kind = loader.check_backbone_class().__name__
        if hasattr(loader, "converter"):  # of a folder that is not KerasHub's own
            return kind, dict(loader.converter.convert_backbone_config(loader.config))
        return kind, dict(loader.config["config"])
    except Exception as error:
        raise InputError(f"KerasHub knows no backbone for {spelling!r}: {_first_line(error)}") from error


def _converter_of(folder: Path) -> Any:
    import keras_hub

    try:
        return keras_hub.layers.ImageConverter.from_preset(str(folder))
    except Exception:  # KerasHub raises errors of several kinds where a preset has none
        return None


def _range_of(spelling: str, folder: Path, converter: Any, input_range: str) -> dict[str, Any]:
    """What is done to pixels: as the user says, by the preset's converter, or by the preprocessor of Hugging Face."""
    if input_range:
        return range_facts(input_range)
    scale, offset = (getattr(converter, name, None) for name in ("scale", "offset"))
    if scale is None and offset is None:
        found = _hugging_face_range(folder)
        if found is None:
            raise InputError(
                f"The preset {spelling!r} does not say what its pixels were scaled to (no image converter does); give "
                f"--input-range as it was trained, one of {', '.join(RANGES)}."
            )
        scale, offset = found
    scale, offset = (_by_channel(1.0 if scale is None else scale), _by_channel(0.0 if offset is None else offset))
    return {"scale": scale, "offset": offset, "channel_order": "rgb"}


def _hugging_face_range(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Scale and offset of preprocessor_config.json: pixels times rescale_factor, less the mean, by the deviation."""
    file = folder / "preprocessor_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        factor = float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0
        normalises = found.get("do_normalize", True)
        mean = _by_channel(found["image_mean"] if normalises else 0.0)
        std = _by_channel(found["image_std"] if normalises else 1.0)
        scale = tuple(factor / deviation for deviation in std)
        return scale, tuple(-middle / deviation for middle, deviation in zip(mean, std, strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None


def _by_channel(value: Any) -> tuple[float, ...]:
    return tuple(float(part) for part in value) if hasattr(value, "__len__") else (float(value),) * 3


def _pooled(card: Source, backbone: Any, size_px: int) -> Any:
    """The backbone as a functional model from images to features (N, F)."""
    import keras

    x: Any = getattr(backbone, "output", None)
    if not hasattr(x, "shape") or len(getattr(backbone, "inputs", ())) != 1:
        raise InputError(f"The {card.architecture} in {card.name!r} gives no single map of features.")
    images = backbone.inputs[0]
    if not _comes_back(backbone):
        from tfxfer.sources.kerashub_layer import HubBackbone

        images = keras.Input((size_px, size_px, 3), name="images", dtype="float32")
        x = HubBackbone(backbone, name=backbone.name)(images)
    if len(x.shape) == 4:
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    elif len(x.shape) == 3 and card.architecture in CLASS_TOKEN:
        x = keras.layers.Cropping1D((0, x.shape[1] - 1), name="class_token")(x)
        x = keras.layers.Flatten(name="pool")(x)
    elif len(x.shape) == 3:
        x = keras.layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(images, x, name=card.architecture)


def _comes_back(backbone: Any) -> bool:
    """Whether the backbone's layers can be saved and read back one by one; of KerasHub's transformers many cannot."""
    import keras

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            keras.Model.from_config(keras.Model(backbone.inputs[0], backbone.output).get_config())
        return True
    except Exception:  # a config that its own class refuses raises anything
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

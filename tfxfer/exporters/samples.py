"""The images that a certificate rests on, what `predict` gave for them, and how they are fed to an artifact."""

import dataclasses
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tfxfer.errors import CheckError, InputError
from tfxfer.runtime.files import atomic_path
from tfxfer.runtime.store import Rows, RowStore

TEST_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Task:
    """One way of feeding images to an artifact, and the probabilities that must come out.

    Attributes:
        name: Of the result file.
        kind: "images" (arrays) or "bytes" (encoded files).
        files: Array files in the folder of inputs: one with all images, or one a encoded file.
        count: Images fed.
        batch_size: Images a call.
        made_up: Rows that are no real image, see `make_samples`.
    """

    name: str
    kind: str
    files: tuple[str, ...]
    count: int
    batch_size: int
    made_up: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Images in every shape they are checked in.

    Attributes:
        images: (n, S, S, 3) uint8, real images of the model's own size.
        labels: (n,) int64.
        others: Images (H, W, 3) uint8 of other sizes; the last is made up.
        encoded: Encoded files, whose pixels `decoded` are what Pillow reads from them; the last is made up.
    """

    images: np.ndarray
    labels: np.ndarray
    others: tuple[np.ndarray, ...]
    encoded: tuple[bytes, ...]

    @property
    def real_others(self) -> tuple[np.ndarray, ...]:
        """`others` without the made-up one, as `make_samples` takes them."""
        return self.others[:-1]

    @property
    def decoded(self) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in self.encoded)

    def write_inputs(self, folder: Path, test_images: Rows | None = None) -> tuple[Task, ...]:
        """Put all arrays into `folder` for another process; returns the ways to feed them."""
        count = len(self.images)
        np.save(folder / "images.npy", self.images)
        tasks = [
            Task(f"batch_{size}", "images", ("images.npy",), min(count, most), size)
            for size, most in {1: count, 3: 10, count: count}.items()
        ]
        for index, image in enumerate(self.others):
            np.save(folder / f"other_{index}.npy", image[None])
            made_up = (0,) if index == len(self.others) - 1 else ()
            tasks.append(Task(f"other_{index}", "images", (f"other_{index}.npy",), 1, 1, made_up))
        for index, content in enumerate(self.encoded):
            np.save(folder / f"encoded_{index}.npy", np.frombuffer(content, np.uint8))
        files = tuple(f"encoded_{index}.npy" for index in range(len(self.encoded)))
        for size in sorted({1, len(files)} - {0}) if files else ():
            tasks.append(Task(f"bytes_{size}", "bytes", files, len(files), size, (len(files) - 1,)))
        if test_images is not None:
            store = RowStore.create(folder / "test.npy", test_images.shape, "uint8")
            for start in range(0, len(test_images), TEST_BATCH):
                store.write(start, test_images[start : start + TEST_BATCH])
            store.flush()
            store.close()
            tasks.append(Task("test", "images", ("test.npy",), len(test_images), TEST_BATCH))
        return tuple(tasks)


@dataclasses.dataclass(frozen=True, eq=False)
class Expected:
    """Probabilities by `predict`, float32 (number of images, K), for each field of `Samples` and for the test part."""

    images: np.ndarray
    others: np.ndarray
    encoded: np.ndarray
    test: np.ndarray | None = None

    def of(self, task: Task) -> np.ndarray:
        """What must come out of `task`."""
        if task.name == "test":
            assert self.test is not None
            return self.test
        if task.kind == "bytes":
            return self.encoded
        if task.name.startswith("other_"):
            index = int(task.name.removeprefix("other_"))
            return self.others[index : index + 1]
        return self.images[: task.count]


def make_samples(images: np.ndarray, labels: np.ndarray, others: Sequence[np.ndarray]) -> Samples:
    """Samples from real images; added are a coloured one of another size, and encoded files of both.

    The coloured image shows a swap of channels even where all real images are grey. The JPEG keeps full colour
    resolution, so that its pixels do not depend on which library decodes it.

    Raises:
        InputError: Where an array is not uint8 RGB images, or there are none.
    """
    images, labels = np.asarray(images), np.asarray(labels, np.int64)
    channels = images.shape[-1] if images.ndim else 0
    for array, dims in [(images, 4), *((np.asarray(other), 3) for other in others)]:
        if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != channels or 0 in array.shape:
            raise InputError(
                f"Samples for export must be uint8 images (height, width, channels) with {dims} dimensions, not "
                f"{array.dtype} of shape {array.shape}."
            )
    if len(images) != len(labels):
        raise InputError(f"{len(images)} samples for export came with {len(labels)} labels.")
    probe = _coloured(images.shape[1], channels)
    encoded: tuple[bytes, ...] = ()
    if channels == 3:  # files of other channels are no signature of ours
        jpeg = {"quality": 95, "subsampling": 0}
        encoded = (_encode(images[0], "PNG"), _encode(images[-1], "JPEG", **jpeg), _encode(probe, "JPEG", **jpeg))
    return Samples(images, labels, (*map(np.asarray, others), probe), encoded)


def _coloured(size_px: int, channels: int) -> np.ndarray:
    height, width = size_px * 13 // 10 + 1, size_px * 7 // 10 + 3
    y, x = np.mgrid[:height, :width]
    kinds = [30 + 190 * x / width, 220 - 190 * y / height, np.full(x.shape, 60.0)]
    ramps = np.stack([kinds[channel % 3] for channel in range(channels)], axis=-1)
    return (ramps + np.random.default_rng(0).uniform(-25, 25, ramps.shape)).astype(np.uint8)


def _encode(pixels: np.ndarray, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def write_samples(path: Path, samples: Samples, expected: Expected | None = None) -> None:
    """Write samples.npz: images, labels, probabilities, and other_I, encoded_I with their probabilities.

    Without `expected` the probabilities have no columns: images to export with, not a proof.
    """
    if expected is None:
        expected = Expected(*(np.zeros((len(x), 0)) for x in (samples.images, samples.others, samples.encoded)))
    arrays = {
        "images": samples.images,
        "labels": samples.labels,
        "probabilities": expected.images,
        "other_probabilities": expected.others,
        "encoded_probabilities": expected.encoded,
    }
    arrays |= {f"other_{index}": image for index, image in enumerate(samples.others)}
    arrays |= {f"encoded_{index}": np.frombuffer(content, np.uint8) for index, content in enumerate(samples.encoded)}
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)


def read_samples(path: Path) -> tuple[Samples, Expected]:
    """Read samples.npz.

    Raises:
        CheckError: Where it is missing, damaged or not complete.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            others = tuple(stored[f"other_{index}"] for index in range(len(stored["other_probabilities"])))
            files = tuple(stored[f"encoded_{index}"].tobytes() for index in range(len(stored["encoded_probabilities"])))
            samples = Samples(stored["images"], stored["labels"], others, files)
            expected = Expected(stored["probabilities"], stored["other_probabilities"], stored["encoded_probabilities"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckError(f"Cannot read the kept samples {path}: {error}. Export the model again.") from None
    return samples, expected

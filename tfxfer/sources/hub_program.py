"""A SavedModel that passed the gate, loaded and ready to run."""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfxfer.errors import InputError
from tfxfer.runtime.files import sha256_of_folder
from tfxfer.sources.hub_anatomy import anatomy_of
from tfxfer.sources.safety import check_saved_model


class Program:
    """A SavedModel that passed the gate and is loaded: from a copy of its own, so that nothing can change under it.

    Args:
        folder: The SavedModel.
        sha256: What `sha256_of_folder` must give; "" leaves that open.

    Raises:
        InputError: Where the digest differs, the gate refuses it, or TensorFlow cannot load it.
    """

    def __init__(self, folder: Path, sha256: str = ""):
        kept = tempfile.mkdtemp(prefix="tfxfer-program-")
        weakref.finalize(self, shutil.rmtree, kept, ignore_errors=True)
        self.folder = Path(kept) / "saved_model"
        shutil.copytree(folder, self.folder, symlinks=True)
        self.sha256 = sha256_of_folder(self.folder)
        if sha256 and sha256 != self.sha256:
            raise InputError(
                f"{folder} has SHA-256 {self.sha256} where {sha256} is expected: it was changed or damaged; get it "
                "again."
            )
        check_saved_model(self.folder)
        self.anatomy = anatomy_of(self.folder)
        try:
            self.loaded = tf.saved_model.load(str(self.folder))
            self.variables = [_follow(self.loaded, slot.path) for slot in self.anatomy.slots]
            self._bind_constants()
        except Exception as error:  # TensorFlow raises almost anything
            raise InputError(f"TensorFlow cannot load {folder}: {reason(error)}") from error

    def __call__(self, images: Any, *, training: bool) -> Any:
        """Run it.

        Args:
            images: (N, S, S, 3), of the type it takes.
            training: Its training mode, which moves its statistics.
        """
        anatomy = self.anatomy
        images = tf.cast(images, anatomy.input_dtype)
        if anatomy.is_signature:
            return self.loaded.signatures[anatomy.endpoint](**{anatomy.input_name: images})
        if training and anatomy.training_endpoint:
            return getattr(self.loaded, anatomy.training_endpoint)(images)
        function = getattr(self.loaded, anatomy.endpoint)
        if not anatomy.training:
            return function(images)
        inference = False if "false" in anatomy.training else None
        return function(images, training=True if training else inference)

    def _bind_constants(self) -> None:
        """Let tensors that the functions captured (a mean to subtract) be constants of the graph that calls them.

        As captures they would be inputs of every graph around, which converters to ONNX keep: a model that cannot run.
        """
        anatomy = self.anatomy
        names = [name for name in (anatomy.endpoint, anatomy.training_endpoint) if name]
        functions = (
            [self.loaded.signatures[anatomy.endpoint]]
            if anatomy.is_signature
            else [found for name in names for found in getattr(self.loaded, name).concrete_functions]
        )
        for function in functions:
            function.set_external_captures([_constant(captured) for captured in function.captured_inputs])

    @property
    def resources(self) -> list[Any]:
        """What must be tracked beside the variables where a function that runs it is saved: tables and their files."""
        kind = tf.saved_model.experimental.TrackableResource
        return [part for part in tf.train.TrackableView(self.loaded).descendants() if isinstance(part, kind)]


def _follow(loaded: Any, path: Sequence[str]) -> tf.Variable:
    for name in path:
        loaded = tf.train.TrackableView.children(loaded)[name]
    return loaded


def _constant(captured: Any) -> Any:
    """A captured tensor as what makes a constant of it; anything else as it is."""
    if not isinstance(captured, tf.Tensor) or captured.dtype in (tf.resource, tf.variant):
        return captured
    value = captured.numpy()
    return lambda: tf.constant(value)


def reason(error: Exception) -> str:
    """What went wrong in one line: of TensorFlow's reports the line about the op that failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    at_op = next((index for index, line in enumerate(lines) if line.startswith("[[{{node")), 0)
    return lines[max(at_op - 1, 0)][:300]

"""Start early: read images while TensorFlow is still being imported on another thread."""

import importlib
import threading
from pathlib import Path
from typing import Any

from tfxfer.data import load_data
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan
from tfxfer.workflow.run import Run, new_run_folder


def train_early(data: Any, plan: Plan, *, out: str | Path | None, split: str | Path | None, progress: Progress) -> Run:
    """`training.train`, with the import of TensorFlow and the decoding of images side by side.

    Decoding is Pillow's, in threads that hold no lock; importing TensorFlow is three to fifteen seconds of one core.
    """
    folder = new_run_folder(out, Path(str(data)).name)
    importer = threading.Thread(target=_import_quietly, daemon=True)
    importer.start()
    progress.phase("reading and auditing images")
    try:
        dataset = load_data(
            data, seed=plan.seed, val_fraction=plan.val_fraction, group_by=plan.group_by or None, split=split,
            image_size=plan.image_size, on_progress=progress.update,
        )  # fmt: skip
    finally:
        importer.join()  # Python must not end while the import runs
    from tfxfer.workflow.training import train

    return train(dataset, plan, out=folder, progress=progress)


def _import_quietly() -> None:
    try:
        importlib.import_module("tfxfer.workflow.training")
    except ImportError:  # the import below raises it again, where it is seen
        return

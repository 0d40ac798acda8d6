"""Start early: read images while TensorFlow is still being imported on another thread."""

import importlib
import threading
import time
from pathlib import Path
from typing import Any

from tfxfer.data import Dataset, load_data
from tfxfer.data.load import look_over
from tfxfer.errors import InputError
from tfxfer.runtime.process import seconds_since_start
from tfxfer.runtime.progress import Progress
from tfxfer.specs import Plan
from tfxfer.workflow.continuing import Earlier, earlier_run
from tfxfer.workflow.run import Run, begun_run, new_run_folder


def read_data(
    data: Any, plan: Plan, split: str | Path | None, progress: Progress, earlier: Earlier | None = None
) -> Dataset:
    """`load_data` as a plan wants it, split as a run that is continued was; a Dataset is taken as it is."""
    if earlier is not None and split is not None:
        raise InputError(f"{earlier.run.path} goes on with its own split, so --split would do nothing; drop it.")
    if isinstance(data, Dataset):
        return data
    progress.phase("reading and auditing images")
    return load_data(
        data,
        seed=plan.seed,
        val_fraction=plan.val_fraction,
        group_by=plan.group_by or None,
        near_duplicates={"on": True, "off": False}.get(plan.near_duplicates, plan.near_duplicates),
        split=split if earlier is None else earlier.split,
        image_size=plan.image_size,
        on_progress=progress.update,
    )


def train_early(
    data: Path,
    plan: Plan,
    *,
    out: str | Path | None,
    split: str | Path | None,
    progress: Progress,
    **options: Any,
) -> Run:
    """`training.train` on a folder or CSV, with the import of TensorFlow and the decoding of images side by side.

    Decoding is Pillow's, in threads that hold no lock; importing TensorFlow is three to fifteen seconds of one core.

    Args:
        data: Folder or CSV.
        plan: What to do.
        out, split, progress: As `train` takes them.
        **options: Its others.
    """
    unfinished = begun_run(out, plan) if options.get("resume") else None
    if unfinished and unfinished.info["status"] == "complete":
        return unfinished
    folder = unfinished.path if unfinished else new_run_folder(out, Path(data).name)
    if not Path(data).exists():  # nothing to wait for an import for
        raise InputError(f"There is no folder or CSV file {data}; give the one that holds the images.")
    names = look_over(data)
    earlier = earlier_run(plan)
    if earlier is not None:
        earlier.classes(names, plan.drop_class, Path(data).name)
    if split is not None and not Path(split).is_file():
        raise InputError(f"There is no split file {split}; give the split.csv of a run, or drop --split.")
    importer = threading.Thread(target=_import_quietly, daemon=True)
    importer.start()
    try:
        dataset = read_data(data, plan, split, progress, earlier)
    finally:
        importer.join()  # Python must not end while the import runs
    from tfxfer.workflow.training import train

    decide_always_alike()
    started = time.monotonic() - seconds_since_start()  # what a time limit counts from
    return train(dataset, plan, out=folder, progress=progress, started=started, **options)


def decide_always_alike() -> None:
    """On CPU every sum in the same order, so that a resumed run is the unstopped one; that costs nothing there."""
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        tf.config.experimental.enable_op_determinism()


def _import_quietly() -> None:
    try:
        importlib.import_module("tfxfer.workflow.training")
    except ImportError:  # the import below raises it again, where it is seen
        return

"""Labelled images: read, audited, grouped and split."""

from collections.abc import Callable
from types import ModuleType

from tfxfer.data.dataset import Dataset, Part
from tfxfer.data.load import load_data, load_test_data


def _folder() -> ModuleType:
    from tfxfer.data import folder

    return folder


def _table() -> ModuleType:
    from tfxfer.data import table

    return table


def _arrays() -> ModuleType:
    from tfxfer.data import arrays

    return arrays


def _tf_data() -> ModuleType:
    from tfxfer.data import tf_data

    return tf_data


def _hugging_face() -> ModuleType:
    from tfxfer.data import hugging_face

    return hugging_face


# A reader is a module with `reads(data) -> bool` and `read(data, class_names) -> Reading`; the first that reads wins.
READERS: dict[str, Callable[[], ModuleType]] = {
    "folder": _folder,
    "table": _table,
    "arrays": _arrays,
    "tf_data": _tf_data,
    "hugging_face": _hugging_face,
}

__all__ = ["READERS", "Dataset", "Part", "load_data", "load_test_data"]

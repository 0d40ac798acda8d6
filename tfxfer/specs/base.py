"""The base of the specs: frozen dataclasses to and from plain dicts."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from tfxfer.errors import InputError, did_you_mean


class Spec:
    """Base of the dataclasses here: to and from plain dicts, unknown keys refused by name."""

    what: ClassVar[str] = "spec"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain mapping.

        Raises:
            InputError: Where a key is unknown or missing, or a value is out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in fields:
                raise InputError(f"Unknown key {key!r} in the {cls.what}. {did_you_mean(key, fields)}")
        for key, value in values.items():
            _check_type(f"{key!r} in the {cls.what}", value, fields[key].type)
        needed = [name for name, field in fields.items() if _is_required(field) and name not in values]
        if needed:
            raise InputError(f"The {cls.what} is not complete: it needs {', '.join(map(repr, needed))}.")
        return cls(**{key: _frozen(value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, of what TOML and JSON can hold; `None` is left out."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) is not None
        }


def _is_required(field: dataclasses.Field) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    int | float | str: ((int, float, str), "a number or text"),
    str | tuple[str, ...]: ((str, list, tuple), "text or a list of texts"),
}


def _check_type(what: str, value: Any, wanted: Any) -> None:
    kinds, words = _TYPES.get(wanted, ((object,), ""))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
        raise InputError(f"{what} must be {words}, not {value!r}.")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: Where it is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from None


def need(condition: bool, sentence: str) -> None:
    if not condition:
        raise InputError(sentence[0].upper() + sentence[1:])

"""The config of a Keras model: only classes and functions on the list, none that hold code or load paths."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfxfer.sources.safety import keras_names
from tfxfer.sources.safety.refusal import MAX_CONFIG_BYTES, refusal, shown

# Each opening bracket becomes a Python object: a bound on memory and on time.
MAX_CONTAINERS = 1_000_000
# Values that Keras writes as objects of these names.
VALUES = {
    "__keras_tensor__",
    "__tensor__",
    "__numpy__",
    "__bytes__",
    "__ellipsis__",
    "__slice__",
    "__tuple__",
    "TensorShape",
}
FUNCTIONS = keras_names.ACTIVATIONS | keras_names.LOSSES_AND_METRICS
FUNCTION_MODULES = {
    "builtins",
    "keras.activations",
    "keras.losses",
    "keras.metrics",
    "keras.ops",
    "keras.ops.nn",
    "keras.src.ops.nn",
    "keras.src.ops.numpy",
    "keras.src.activations.activations",
    "keras.src.losses.losses",
    "keras.src.metrics.accuracy_metrics",
}
OURS = {
    "tfxfer>AdaptImage": "AdaptImage",
    "tfxfer>BlockwiseAdamW": "BlockwiseAdamW",
    "tfxfer>HubBackbone": "HubBackbone",
    "tfxfer>HubLayer": "HubLayer",
}
# Why, where the mere "not on the list" would leave the user wondering.
REASONS = {
    "Lambda": "holds Python code",
    "__lambda__": "holds Python code",
    "TFSMLayer": "loads another SavedModel by its path",
    "TorchModuleWrapper": "holds a pickle",
    "JaxLayer": "holds Python code",
    "FlaxLayer": "holds Python code",
    "__typespec__": "names a Python class to be looked up",
}
# Keys whose text Keras or KerasHub would open as a file.
PATH_KEYS = {"vocabulary", "idf_weights", "merges", "proto", "filepath", "vocabulary_file"}
# Here names are of layers and outputs, whatever they are called.
LAYER_KEYS = {"input_layers", "output_layers", "inbound_nodes"}
_ANY: frozenset[str] = frozenset({"*"})
_HUB_MODULE = re.compile(r"keras_hub(\.src)?\.(layers|models|tokenizers|utils)(\.[a-z0-9_]+)*")
_HUB_CLASS = re.compile(
    r"[A-Z][A-Za-z0-9]{0,60}(Backbone|Classifier|Segmenter|Detector|Preprocessor|Converter|Tokenizer|Encoder|Decoder|"
    r"Embedding|Attention|Block|Layer|Head|Norm|Normalization|Packer|CausalLM|LM|Pooling|Stage|Conv|MLP)(V[0-9])?"
)
_PLAIN_DTYPE = re.compile(r"(bool|u?int(8|16|32|64)|float(16|32|64)|bfloat16|<?U[0-9]{1,4}|str|string)")
_TRUST = (
    "name the module of your own class with --trust-custom-objects, or rebuild the model in code and load its weights"
)
_REBUILD = "rebuild the model in code and load only its weights"


def check_config(
    text: bytes,
    path: Path,
    where: str,
    *,
    trusted: Sequence[str] = (),
    weight_bytes: int | None = None,
) -> None:
    """Parse a config and refuse any class, function or path in it that is not on the list.

    Args:
        text: JSON, as Keras 2 or Keras 3 writes it.
        path: The file, for messages.
        where: The member or attribute that holds it, for messages.
        trusted: Modules of the user's own; their classes may stand in it.
        weight_bytes: What the file holds in weights; None where it has none. Layers may not need far more.

    Raises:
        InputError: With the layer and the reason.

    Example:
        >>> check_config(b'{"class_name": "Dense", "config": {"name": "d", "units": 3}}', Path("a.h5"), "config")
    """
    config = parse_config(text, path, where)
    try:
        _walk(config, _Place(path, where, tuple(trusted), weight_bytes))
    except RecursionError:  # pragma: no cover - the walk keeps its own stack
        raise refusal(path, f"{where} is nested too deep", "do not use this file") from None


def parse_config(text: bytes, path: Path, where: str) -> Any:
    """JSON within bounds.

    Raises:
        InputError: Where it is no JSON, too large, or nested too deep.
    """
    if len(text) > MAX_CONFIG_BYTES or text.count(b"{") + text.count(b"[") > MAX_CONTAINERS:
        raise refusal(
            path,
            f"{where} is larger than {MAX_CONFIG_BYTES:,} bytes or {MAX_CONTAINERS:,} parts",
            "no model needs so much: do not use this file",
        )
    try:
        return json.loads(text)
    except (ValueError, UnicodeError) as error:
        raise refusal(path, f"{where} is not JSON ({error})", "get the file again") from error
    except RecursionError:
        raise refusal(path, f"{where} is nested too deep", "do not use this file") from None


class _Place:
    """Where the walk is and by what rules: makes the refusals."""

    def __init__(self, path: Path, where: str, trusted: tuple[str, ...], weight_bytes: int | None):
        self.path, self.where, self.trusted, self.weight_bytes = path, where, trusted, weight_bytes

    def refuse(self, owner: str, reason: str, advice: str = _REBUILD) -> Exception:
        return refusal(self.path, f"in {self.where}, {owner} {reason}", advice)


def _walk(config: Any, place: _Place) -> None:
    """Visit every value; each knows the nearest object around it and the list that a name there must be on."""
    stack: list[tuple[Any, str, frozenset[str] | None]] = [(config, "the model", None)]
    while stack:
        value, owner, names = stack.pop()
        if isinstance(value, str):
            if names and names is not _ANY and value not in names and not _trusted_name(value, place):
                raise place.refuse(owner, f"names the function {shown(value)}, which is not on the list", _TRUST)
        elif isinstance(value, list):
            if names is None:  # plain numbers and texts need no look
                stack += [(item, owner, None) for item in value if isinstance(item, (dict, list))]
            else:
                stack += [(item, owner, names) for item in value]
        elif isinstance(value, dict):
            if "class_name" in value:
                owner, names = _check_object(value, owner, place), None
            for key, item in value.items():
                below = _ANY if key in LAYER_KEYS else role(key)
                stack.append((item, owner, names if names is not None else below))


def role(key: str) -> frozenset[str] | None:
    """The names that may stand under `key`, or None where its text is not a name.

    Example:
        >>> "relu" in role("recurrent_activation"), role("padding")
        (True, None)
    """
    if key == "activation" or key.endswith("_activation"):
        return keras_names.ACTIVATIONS | {"gelu_approximate", "quick_gelu"}
    if key in ("loss", "metrics", "weighted_metrics", "fn"):
        return keras_names.LOSSES_AND_METRICS
    for ending, names in (
        ("initializer", keras_names.INITIALIZERS),
        ("regularizer", keras_names.REGULARIZERS),
        ("constraint", keras_names.CONSTRAINTS),
    ):
        if key == ending or key.endswith(f"_{ending}"):
            return names
    return keras_names.OPTIMIZERS if key == "optimizer" else None


def _check_object(value: Mapping[str, Any], owner: str, place: _Place) -> str:
    """Check one serialised object; returns what to call it in messages."""
    class_name, inner = value["class_name"], value.get("config")
    name = inner.get("name") if isinstance(inner, dict) else value.get("name")
    label = f"the {class_name if isinstance(class_name, str) and class_name.isidentifier() else 'object'}"
    label += f" {shown(name)}" if isinstance(name, str) else f" inside {owner}" if " inside " not in owner else ""
    if not isinstance(class_name, str):
        raise place.refuse(label, "has a class that is no name", "do not use this file")
    if class_name in REASONS:
        raise place.refuse(label, f"is a {class_name}, which {REASONS[class_name]}")
    if class_name == "function":
        _check_function(value, label, place)
    elif class_name in ("TFOpLambda", "SlicingOpLambda"):
        _check_legacy_function(inner, label, place)
    elif class_name in VALUES:
        _check_value(inner, label, place)
    elif not _known_class(value, class_name, place):
        module = value.get("module")
        registered = value.get("registered_name")
        origin = f" of the module {shown(module)}" if module else ""
        origin += f" registered as {shown(registered)}" if registered and registered != class_name else ""
        raise place.refuse(label, f"has the class {shown(class_name)}{origin}, which is not on the list", _TRUST)
    if isinstance(inner, dict):
        _check_members(inner, label, place)
    return label


def _known_class(value: Mapping[str, Any], class_name: str, place: _Place) -> bool:
    """Whether the class is Keras' own, ours, KerasHub's, or in a module that the user trusts."""
    module, registered = value.get("module"), value.get("registered_name")
    if not all(item is None or isinstance(item, str) for item in (module, registered)):
        return False
    if module and _is_trusted(module, place.trusted):
        return registered in (None, "", class_name) or registered.rpartition(">")[2] == class_name
    # Keras looks a registered name up first, so it must agree with the class.
    label = registered or class_name
    if ">" in label:
        package, _, bare = label.partition(">")
        if class_name not in (label, bare):
            return False
        if label in OURS:
            return module is None or module == "tfxfer" or module.startswith("tfxfer.")
        if package == "keras_hub":
            return bool(_HUB_CLASS.fullmatch(bare)) and (module is None or bool(_HUB_MODULE.fullmatch(module)))
        if package == "Custom" and not module and bare in keras_names.CLASSES["keras.optimizers"]:
            return True  # as tf_keras calls its own optimizers
        return module is None and _trusted_name(label, place)
    if registered not in (None, "", class_name):
        return False
    if module:
        return class_name in keras_names.CLASSES.get(module, ())
    return class_name in _BARE_CLASSES


_BARE_CLASSES = frozenset().union(*keras_names.CLASSES.values()) | keras_names.LEGACY_CLASSES


def _check_function(value: Mapping[str, Any], label: str, place: _Place) -> None:
    """An object of class `function` names a function of Keras, or of a trusted module."""
    name, module, registered = value.get("config"), value.get("module"), value.get("registered_name")
    if isinstance(name, str) and isinstance(module, str):
        if _is_trusted(module, place.trusted):
            return
        if registered in (None, "", name) and module in FUNCTION_MODULES and name in FUNCTIONS:
            return
        if module.startswith("keras_hub.") and registered == f"keras_hub>{name.rpartition('>')[2]}":
            return
    raise place.refuse(label, f"names the function {shown(name)} of {shown(module)}, which is not on the list", _TRUST)


def _check_legacy_function(inner: Any, label: str, place: _Place) -> None:
    function = inner.get("function") if isinstance(inner, dict) else None
    if function not in keras_names.LEGACY_FUNCTIONS:
        raise place.refuse(label, f"calls the TensorFlow function {shown(function)}, which is not on the list")


def _check_value(inner: Any, label: str, place: _Place) -> None:
    """Arrays in a config: plain dtypes only, since 'S4000000000' is four gigabytes a letter."""
    dtype = inner.get("dtype") if isinstance(inner, dict) else None
    if dtype is not None and not (isinstance(dtype, str) and _PLAIN_DTYPE.fullmatch(dtype)):
        raise place.refuse(label, f"has the dtype {shown(dtype)}, which is not on the list")


def _check_members(inner: Mapping[str, Any], label: str, place: _Place) -> None:
    """No text that would be opened as a file, and no more units than the weights can fill."""
    for key in PATH_KEYS & inner.keys():
        if isinstance(inner[key], str):
            raise place.refuse(
                label,
                f"would read the file {shown(inner[key])} for its {key}",
                "save the model with the vocabulary inside it",
            )
    if place.weight_bytes is None:
        return
    for needed, what in _needed_numbers(inner):
        # A packed number may take half a byte; nothing takes an eighth.
        if needed > 2**20 and needed > 8 * place.weight_bytes:
            raise place.refuse(
                label,
                f"declares {what} = {needed:,}, and all weights of the file have {place.weight_bytes:,} bytes",
                "do not use this file",
            )


def _needed_numbers(inner: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """How many numbers a layer of this config needs at least."""
    sizes = {
        key: size for key in ("units", "filters", "input_dim", "output_dim") if isinstance(size := inner.get(key), int)
    }
    yield from ((size, key) for key, size in sizes.items())
    if "input_dim" in sizes and "output_dim" in sizes:
        yield sizes["input_dim"] * sizes["output_dim"], "input_dim times output_dim"


def _is_trusted(module: str, trusted: Sequence[str]) -> bool:
    """Whether `module` is one of the user's own, or inside one.

    Example:
        >>> [_is_trusted(module, ["mine", "keras"]) for module in ("mine.layers", "mineral", "keras.layers")]
        [True, False, False]
    """
    # Trust is for the user's own code: it does not widen what may be named in these libraries, or in Python itself.
    if module.partition(".")[0] in {"keras", "tensorflow", "tf_keras", "builtins", "tfxfer"} | sys.stdlib_module_names:
        return False
    return any(module == name or module.startswith(f"{name}.") for name in trusted)


def _trusted_name(name: str, place: _Place) -> bool:
    """Whether a registered name ("package>Class", all that a Keras 2 config has) belongs to a trusted module.

    Its package says so, or the class that the user's code has registered under it does. Keras is not imported for
    that: where it is not imported yet, nothing can be registered.
    """
    package = name.partition(">")[0]
    if ">" in name and _is_trusted(package, place.trusted):
        return True
    registration = sys.modules.get("keras.src.saving.object_registration")
    found = getattr(registration, "GLOBAL_CUSTOM_OBJECTS", {}).get(name)
    return _is_trusted(getattr(found, "__module__", None) or "", place.trusted)

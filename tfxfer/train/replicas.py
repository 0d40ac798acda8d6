"""Copies of a network, one on each device of a strategy, that begin alike and stay so."""

import hashlib
import json
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tfxfer.errors import InputError
from tfxfer.model.freeze import hold_spectral_norms

# Between the seeds of two replicas, so that each drops out other units.
SEED_STRIDE = 1_000_003
_SEED = "seed_generator_state"


def describe(network: keras.Model) -> str:
    """A network as JSON: its layers, and which of its variables train; without the values.

    Raises:
        InputError: Where a layer cannot say how it is made anew.
    """
    try:
        config = keras.saving.serialize_keras_object(network)
        held = [
            index
            for index, layer in enumerate(network._flatten_layers())
            if isinstance(layer, keras.layers.SpectralNormalization) and "normalized_weights" in vars(layer)
        ]
        return json.dumps({"network": config, "trains": [v.trainable for v in network.variables], "held": held})
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InputError(_refusal(network.name, error)) from None


class Replicas:
    """A network of `describe` on each device of a strategy. Made by all workers at once, where there are several.

    BatchNorm that trains takes the statistics of the whole batch, over all devices.

    Args:
        text: Of `describe`.
        strategy: Where.

    Attributes:
        model: Its variables are the strategy's.
    """

    def __init__(self, text: str, strategy: tf.distribute.Strategy):
        told = json.loads(text)
        self.strategy, self._numbers = strategy, replica_numbers(strategy)
        try:
            with strategy.scope():
                self.model = keras.saving.deserialize_keras_object(told["network"])
        except (NotImplementedError, TypeError, ValueError) as error:
            raise InputError(_refusal("the network", error)) from None
        if len(self.variables) != len(told["trains"]):
            raise InputError(_refusal(self.model.name, "it gets other variables when it is made anew"))
        for variable, trains in zip(self.variables, told["trains"], strict=True):
            variable.trainable = trains
        for index, layer in enumerate(self.model._flatten_layers()):
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
            if index in told["held"]:
                hold_spectral_norms(layer, True)

    @property
    def variables(self) -> list[keras.Variable]:
        """In the order of those of the network that was described."""
        return self.model.variables

    def set(self, values: Sequence[np.ndarray]) -> None:
        """Set the variables on all of this process' devices; seeds so that no two replicas have the same."""
        for variable, value in zip(self.variables, values, strict=True):
            if variable.path.endswith(_SEED):
                self._set_seeds(variable, np.asarray(value))
            else:
                variable.assign(value)

    def _set_seeds(self, variable: keras.Variable, value: np.ndarray) -> None:
        local = self.strategy.experimental_local_results(variable.value)
        for number, part in zip(self._numbers, local, strict=True):
            seed = (int(value[0]) + SEED_STRIDE * number) % 2**32
            part.assign(np.array([seed, value[1]], value.dtype))

    def copy_to(self, variables: Sequence[keras.Variable]) -> None:
        """Set plain variables to those of this process' first device."""
        for plain, variable in zip(variables, self.variables, strict=True):
            plain.assign(self.strategy.experimental_local_results(variable.value)[0])

    def digests(self) -> list[str]:
        """SHA-256 of the weights on each of this process' devices; those of seeds differ and do not count."""
        columns = [
            self.strategy.experimental_local_results(variable.value)
            for variable in self.variables
            if not variable.path.endswith(_SEED)
        ]
        found = []
        for parts in zip(*columns, strict=True):
            digest = hashlib.sha256()
            for part in parts:
                digest.update(np.ascontiguousarray(part.numpy()).tobytes())
            found.append(digest.hexdigest())
        return found


def replica_numbers(strategy: tf.distribute.Strategy) -> list[int]:
    """Of this process' devices, among those of all workers."""
    numbers: list[int] = []

    def note(context) -> float:
        numbers.append(int(context.replica_id_in_sync_group))
        return 0.0

    strategy.experimental_distribute_values_from_function(note)
    return numbers


def _refusal(name: str, why: object) -> str:
    return (
        f"{name} cannot be copied onto several devices: {' '.join(str(why).split())[:300]}; give strategy 'none', or a "
        "freeze depth behind what cannot be copied."
    )

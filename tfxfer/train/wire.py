"""Messages between two workers of a MultiWorkerMirroredStrategy, over the collective operations that it trains with."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfxfer.errors import CheckError
from tfxfer.runtime import files

# Collective operations take tensors of shapes that both sides know: a message is a first part and as many more as it
# is long.
FIRST_WORDS = 2**14
MORE_WORDS = 2**19
_FIRST, _MORE = 1, 2  # which of the two
_GONE = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError)
Arrays = dict[str, np.ndarray]


class WorkerLost(CheckError):
    """Another worker of this training is gone; none can go on without it."""


class Wire:
    """One direction between two workers.

    Args:
        device: Of this worker, "/job:worker/task:0/device:CPU:0".
        key: The same on both sides, and no other wire's.
    """

    def __init__(self, device: str, key: int):
        self.device, self.key = device, key

    def send(self, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Send facts that JSON can hold, NumPy's numbers too, and arrays by name; returns when the other side has them.

        Raises:
            WorkerLost: Where the other side is gone.
        """
        content = packed(facts, arrays or {})
        room = FIRST_WORDS * 4 - 8
        self._put(len(content).to_bytes(8, "little") + content[:room], FIRST_WORDS, _FIRST)
        for start in range(room, len(content), MORE_WORDS * 4):
            self._put(content[start : start + MORE_WORDS * 4], MORE_WORDS, _MORE)

    def receive(self) -> tuple[dict[str, Any], Arrays]:
        """What was sent; waits for it.

        Raises:
            WorkerLost: Where the other side is gone.
        """
        first = self._get(FIRST_WORDS, _FIRST)
        size = int.from_bytes(first[:8], "little")
        parts = [first[8:]]
        for _ in range(FIRST_WORDS * 4 - 8, size, MORE_WORDS * 4):
            parts.append(self._get(MORE_WORDS, _MORE))
        return unpacked(b"".join(parts))

    def _put(self, content: bytes, num_words: int, instance: int) -> None:
        words = np.frombuffer(content.ljust(num_words * 4, b"\0"), np.int32)
        with in_step(), tf.device(self.device):
            tf.raw_ops.CollectiveBcastSendV2(
                input=tf.constant(words), group_size=2, group_key=self.key, instance_key=instance,
                communication_hint="ring",
            )  # fmt: skip

    def _get(self, num_words: int, instance: int) -> bytes:
        with in_step(), tf.device(self.device):
            words = tf.raw_ops.CollectiveBcastRecvV2(
                shape=[num_words], T=tf.int32, group_size=2, group_key=self.key, instance_key=instance,
                communication_hint="ring",
            )  # fmt: skip
            return words.numpy().tobytes()


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """What all workers do at once ends with `WorkerLost` where one of them is gone."""
    try:
        yield
    except _GONE as error:
        raise _lost(error) from None


def _lost(error: Exception) -> WorkerLost:
    why = " ".join(str(error).split()).split("Collective ops is aborted by: ")[-1][:160]
    return WorkerLost(
        f"Another worker of this training is gone ({why}); look at what it said, and start all of them again with "
        "--resume."
    )


def packed(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Facts and arrays as bytes.

    Example:
        >>> facts, arrays = unpacked(packed({"step": 7}, {"kernel": np.ones((2, 2), "float32")}))
        >>> facts, arrays["kernel"].tolist()
        ({'step': 7}, [[1.0, 1.0], [1.0, 1.0]])
    """
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    rows = [[name, array.dtype.name, list(np.shape(arrays[name]))] for name, array in plain.items()]
    header = json.dumps({"facts": dict(facts), "arrays": rows}, default=files.plain).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *(array.tobytes() for array in plain.values())])


def unpacked(content: bytes) -> tuple[dict[str, Any], Arrays]:
    """What `packed` was given; bytes behind it do not count."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    arrays = {}
    for name, dtype, shape in header["arrays"]:
        kind, count = np.dtype(dtype), int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(content, kind, count, end).reshape(shape)
        end += count * kind.itemsize
    return header["facts"], arrays

"""One worker of a training, run by test_together.py: python one_worker.py '{"data": ..., "outs": [...], ...}'."""

import json
import os
import signal
import sys
from pathlib import Path

import keras
import tensorflow as tf

from tfxfer import Progress, fit
from tfxfer.errors import TfxferError


class Kill(keras.callbacks.Callback):
    """SIGKILL for a process, at the end of the nth batch that this sees; a callback runs on the chief alone."""

    def __init__(self, pid: int, at: int):
        super().__init__()
        self.pid, self.left = pid, at

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            os.kill(self.pid, signal.SIGKILL)


def main(told: dict) -> int:
    tf.config.experimental.enable_op_determinism()
    callbacks = []
    if told.get("kill") is not None:
        pid = int(Path(told["pids"], str(told["kill"])).read_text())
        callbacks = [Kill(pid, told["at"])]
    own = {"strategy": tf.distribute.MultiWorkerMirroredStrategy()} if told.get("own") else {}
    try:
        for out in told["outs"]:
            run = fit(
                "digits_cnn", told["data"], out=out, callbacks=callbacks, progress=Progress(), formats=(),
                baseline="none", checkpoint_seconds=0.0, **told["options"], **own,
            )  # fmt: skip
    except TfxferError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_status
    print(json.dumps({"path": str(run.path), "devices": run.info["devices"], "resumed": run.info["resumed"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

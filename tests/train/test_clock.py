import time

import keras
import numpy as np
import pytest

from tfxfer.train.clock import Clock, StopOnTime


def test_without_a_limit_time_never_runs_out():
    clock = Clock()
    assert clock.remaining() == float("inf") and not clock.expired()
    assert not Clock(0.0, started=time.monotonic() - 1e9).expired()


@pytest.mark.parametrize(("limit", "ago", "left"), [(60, 0, 60), (60, 20, 40), (60, 61, -1)])
def test_it_counts_from_the_start(limit, ago, left):
    clock = Clock(limit, started=time.monotonic() - ago)
    assert clock.remaining() == pytest.approx(left, abs=0.5)
    assert clock.expired() == (left <= 0)


def fit(clock: Clock, epochs: int, seconds_an_epoch: float) -> int:
    class Slow(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            time.sleep(seconds_an_epoch)

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    x = np.ones((2, 2))
    return len(model.fit(x, x[:, :1], epochs=epochs, callbacks=[StopOnTime(clock), Slow()], verbose=0).epoch)


def test_training_stops_after_the_epoch_behind_which_another_would_not_fit():
    fit(Clock(), 1, 0)  # the first fit of a process traces
    clock = Clock(1e9)
    done = []

    class Limit(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            done.append(epoch)
            if epoch == 2:
                clock.limit_seconds = time.monotonic() - clock.started + 0.05

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    x = np.ones((2, 2))
    slow = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: time.sleep(0.2))
    fitted = model.fit(x, x[:, :1], epochs=9, callbacks=[Limit(), StopOnTime(clock), slow], verbose=0)
    assert fitted.epoch == done == [0, 1, 2]  # 0.05 s are left, an epoch takes 0.2


def test_an_epoch_under_way_is_finished_and_no_limit_stops_nothing():
    assert fit(Clock(0.01), 4, 0.05) == 1
    assert fit(Clock(), 4, 0.0) == 4
    assert fit(Clock(3600), 4, 0.0) == 4

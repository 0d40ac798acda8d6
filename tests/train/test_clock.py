import time

import keras
import numpy as np
import pytest

from tfxfer.train.clock import Clock, StopOnTime


def test_without_a_limit_time_never_runs_out():
    clock = Clock()
    clock.keep_back("export", 1e9)
    assert clock.remaining() == clock.left() == float("inf") and not clock.expired() and not clock.limited
    assert not Clock(0.0, started=time.monotonic() - 1e9).expired()


@pytest.mark.parametrize(("limit", "ago", "left"), [(60, 0, 60), (60, 20, 40), (60, 61, -1)])
def test_it_counts_from_the_start(limit, ago, left):
    clock = Clock(limit, started=time.monotonic() - ago)
    assert clock.remaining() == pytest.approx(left, abs=0.5)
    assert clock.expired() == (left <= 0) and clock.limited


def test_what_is_kept_back_is_not_left_for_what_is_at_work():
    clock = Clock(60)
    clock.keep_back("export", 30)
    clock.keep_back("scoring", 5)
    clock.keep_back("scoring", 25)  # a better figure for the same
    clock.keep_back("nothing", -4)
    assert clock.remaining() == pytest.approx(5, abs=0.5) and clock.left() == pytest.approx(60, abs=0.5)
    again = clock.again()
    clock.release("export")
    clock.release("never kept")
    assert clock.remaining() == pytest.approx(35, abs=0.5)
    assert again.remaining() == pytest.approx(5, abs=0.5)  # another training's own


def test_another_training_is_not_stopped_because_one_was():
    clock = Clock(60)
    clock.stopped = True
    assert clock.expired() and not clock.again().expired()


class ByHand(Clock):
    """A clock that goes on only where it is told."""

    def __init__(self, seconds: float):
        self.at = 0.0
        super().__init__(seconds, now=lambda: self.at)


def batches_until_stop(clock: ByHand, *, batch=1.0, held=0.0, told=0.0, epochs=4, steps=5) -> tuple:
    """(batches that were begun, StopOnTime), where each batch and each end of an epoch takes its time."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    watch = StopOnTime(clock, told)
    watch.set_model(model)
    watch.set_params({"epochs": epochs, "steps": steps})
    model.stop_training, begun = False, 0
    for epoch in range(epochs):
        for number in range(steps):
            watch.on_train_batch_begin(number)
            clock.at += batch
            begun += 1
            watch.on_train_batch_end(number)
            if model.stop_training:
                break
        clock.at += held
        watch.on_epoch_end(epoch)
        if model.stop_training:
            return begun, watch
    return begun, watch


@pytest.mark.parametrize(
    ("limit", "begun", "stopped"),
    [(20, 20, False), (19.5, 19, True), (7, 7, True), (7.9, 7, True), (5, 5, True), (0.5, 1, True)],
)
def test_training_stops_before_the_batch_that_would_pass_the_limit(limit, begun, stopped):
    clock = ByHand(limit)
    assert batches_until_stop(clock)[0] == begun
    assert clock.stopped == stopped and clock.at <= max(limit, 1)  # the first batch is begun in any case


def test_the_pass_that_ends_an_epoch_has_its_time_too():
    clock = ByHand(18)  # an epoch is 5 + 3 s; behind two of them neither a batch nor its judging fits
    begun, watch = batches_until_stop(clock, held=3.0, told=3.0)
    assert (begun, clock.at) == (10, 16.0) and watch.stopped
    clock = ByHand(12)  # of the second epoch one batch, and the pass over held-out images
    begun, _ = batches_until_stop(clock, held=3.0, told=3.0)
    assert (begun, clock.at) == (6, 12.0)


def test_what_an_epoch_s_end_takes_is_learnt():
    clock = ByHand(13)
    begun, watch = batches_until_stop(clock, held=3.0, told=0.0)
    assert (begun, clock.at) == (7, 13.0) and watch.held_seconds == 3.0


def test_seconds_kept_back_stop_earlier():
    clock = ByHand(20)
    clock.keep_back("export", 13)
    assert batches_until_stop(clock)[0] == 7


def test_keras_own_fit_stops_too():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    x = np.ones((8, 2))
    model.fit(x, x[:, :1], verbose=0)  # the first fit of a process traces
    clock = Clock(1e9)

    def end(batch, logs):
        if batch == 1:
            clock.limit_seconds = 1e-9

    watch = StopOnTime(clock)
    ended = keras.callbacks.LambdaCallback(on_train_batch_end=end)
    seen = []
    count = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: seen.append(batch))
    model.fit(x, x[:, :1], batch_size=2, epochs=3, callbacks=[ended, watch, count], verbose=0)
    assert seen == [0, 1] and watch.stopped and clock.expired()
    model.fit(x, x[:, :1], batch_size=2, epochs=3, callbacks=[StopOnTime(Clock(3600)), count], verbose=0)
    assert len(seen) == 2 + 12

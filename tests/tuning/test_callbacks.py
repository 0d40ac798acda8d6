import keras
import numpy as np
import pytest

from tfxfer.tuning.callbacks import MedianRecord, MedianStopping, OnWholeModel


def dense():
    model = keras.Sequential([keras.layers.Dense(2)])
    model.build((None, 3))
    return model


class Seen(keras.callbacks.Callback):
    def __init__(self, stop_at=None):
        super().__init__()
        self.events, self.stop_at = [], stop_at

    def on_train_begin(self, logs=None):
        self.events.append("begin")

    def on_epoch_end(self, epoch, logs=None):
        self.events.append((epoch, logs["loss"]))
        if epoch == self.stop_at:
            self.model.stop_training = True


def test_callbacks_see_the_whole_model_and_can_stop_the_part():
    whole, part, seen = dense(), dense(), Seen(stop_at=1)
    between = OnWholeModel([seen], whole)
    between.set_model(part)
    part.stop_training = False
    between.on_train_begin()
    between.on_epoch_end(0, {"loss": 3.0})
    assert seen.model is whole and not part.stop_training
    between.on_epoch_end(1, {"loss": 2.0})
    assert part.stop_training and seen.events == ["begin", (0, 3.0), (1, 2.0)]


def test_a_trial_below_the_median_of_running_means_is_stopped():
    """Others had on the average 0.5, 0.6, 0.7 by the second epoch."""
    record = MedianRecord("val_accuracy", "max", warm_up=3)
    for values in ([0.4, 0.6], [0.6, 0.6], [0.6, 0.8]):
        record.finish(values)
    assert record.is_hopeless(0.59, 1) and not record.is_hopeless(0.61, 1)
    assert not record.is_hopeless(0.0, 2)  # nobody came so far


def test_losses_count_downwards_and_the_first_trials_are_never_stopped():
    record = MedianRecord("val_loss", "min", warm_up=2)
    record.finish([1.0])
    assert not record.is_hopeless(9.0, 0)
    record.finish([2.0])
    assert record.is_hopeless(1.6, 0) and not record.is_hopeless(1.4, 0)


@pytest.mark.parametrize("values", [[0.9, 0.1], [0.1, 0.1]])
def test_it_is_the_best_epoch_so_far_that_counts(values):
    record = MedianRecord("val_accuracy", "max", warm_up=1)
    record.finish([0.5, 0.5])
    callback, model = MedianStopping(record), dense()
    callback.set_model(model)
    model.stop_training = False
    callback.on_epoch_end(0, {"val_accuracy": values[0]})
    hopeless = values[0] < 0.5
    assert model.stop_training == hopeless and callback.stopped_at == (0 if hopeless else None)
    callback.on_epoch_end(1, {"val_accuracy": values[1]})
    assert callback.stopped_at == (1 if hopeless else None)
    callback.on_train_end()
    assert record.num_finished == 2 and np.isclose(record._means[1][-1], np.mean(values))

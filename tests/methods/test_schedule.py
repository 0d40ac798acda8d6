import keras
import numpy as np
import pytest

from tfxfer.methods.schedule import warmup_cosine


@pytest.mark.parametrize(("total", "share"), [(50, 0.0), (50, 0.1), (40, 0.5), (7, 0.3), (200, 0.05)])
def test_it_is_keras_cosine_decay_after_a_linear_warm_up(total, share):
    warmup = round(total * share)
    decay = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else 1.0, total - warmup, alpha=0.0, warmup_target=1.0 if warmup else None, warmup_steps=warmup
    )
    ours = [warmup_cosine(step, total, share) for step in range(total)]
    theirs = [float(decay(step)) for step in range(total)]
    np.testing.assert_allclose(ours[warmup:], theirs[warmup:], atol=1e-6)
    # Keras wastes its first step on a rate of zero; ours climbs a step earlier.
    np.testing.assert_allclose(ours[: max(warmup - 1, 0)], theirs[1 : max(warmup, 1)], atol=1e-6)
    if warmup:
        assert ours[0] == pytest.approx(1 / warmup) and ours[warmup - 1] == 1.0


def test_it_ends_near_zero_and_never_leaves_zero_to_one():
    ours = [warmup_cosine(step, 100, 0.1) for step in range(130)]
    assert ours[99] == pytest.approx(0.5 * (1 + np.cos(np.pi * 89 / 90)))
    assert ours[100:] == [0.0] * 30
    assert min(ours) >= 0 and max(ours) == 1.0
    assert ours[9:100] == sorted(ours[9:100], reverse=True)


def test_a_stage_of_one_step_has_the_peak_rate():
    assert warmup_cosine(0, 1, 0.1) == 1.0
    assert warmup_cosine(0, 1, 0.9) == 1.0

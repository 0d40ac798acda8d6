import csv
import dataclasses

import numpy as np
import pytest
from PIL import Image
from test_loop import ROWS, STAGE, ready
from test_stages import PROBE, STRONG, data, small_digits  # noqa: F401 (fixtures)

from tfxfer.specs import Plan, Recipe
from tfxfer.train.journal import Journal
from tfxfer.train.loop import NotFinite
from tfxfer.train.rates import RateTest, growing_rates, measure_rates, smooth, suggest
from tfxfer.train.stages import run_stages
from tfxfer.workflow.rate_plot import BLUE, GREEN, write_rate_tests


def test_rates_grow_by_one_factor_over_six_powers_of_ten():
    rates = growing_rates()
    assert len(rates) == 100 and (rates[0], rates[-1]) == (pytest.approx(1e-6), pytest.approx(1.0))
    np.testing.assert_allclose(rates[1:] / rates[:-1], 1e6 ** (1 / 99))


def test_the_smoothed_loss_is_the_weighted_mean_of_the_losses_before():
    losses = np.random.default_rng(0).uniform(0, 3, 20)
    for count in (1, 7, 20):
        weights = 0.9 ** np.arange(count)[::-1]
        assert smooth(losses)[count - 1] == pytest.approx(weights @ losses[:count] / weights.sum())


def test_suggestions_of_a_curve_that_is_known():
    rates = growing_rates(601)
    x = np.log10(rates)
    # Falls steepest at 1e-3 (a logistic step), rises from 1e-1.5 on.
    losses = 2 - 1 / (1 + np.exp(-4 * (x + 3))) + np.maximum(x + 1.5, 0) ** 2 * 5
    found = suggest(rates, losses)
    assert np.log10(found["steepest"]) == pytest.approx(-3, abs=0.02)
    assert np.log10(found["minimum_tenth"]) == pytest.approx(np.log10(rates[losses.argmin()]) - 1)
    assert found["rate"] == found["minimum_tenth"]


def test_a_loss_that_only_rises_suggests_a_tenth_of_where_it_began():
    found = suggest(growing_rates(), np.linspace(1, 9, 100))
    assert set(found) == {"minimum_tenth", "rate"} and found["rate"] < 1e-6
    assert suggest([1e-6], [1.0])["rate"] == pytest.approx(1e-7)  # went astray at once


def test_the_losses_are_those_of_steps_at_these_rates_and_the_weights_come_back():
    _, trainer = ready(dataclasses.replace(STAGE, average=0.9), dropout=0.3, views=("plain", "mirror"))
    before = [value.copy() for value in trainer.start]
    arrays, _ = measure_rates(trainer, ROWS, seed=5)
    for value, start in zip(trainer.suffix.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, start)
    assert all(
        np.array_equal(v.numpy(), f) for v, f in zip(trainer.step.optimizer.variables, trainer._fresh, strict=True)
    )

    _, other = ready(dataclasses.replace(STAGE, average=0.9), dropout=0.3, views=("plain", "mirror"))
    other._restart(5)
    batches, losses = other.batches(ROWS, 5), []
    for step in range(7):  # two batches an epoch
        batch = list(batches.epoch(step // 2))[step % 2]
        other.suffix.optimizer.learning_rate = growing_rates()[step]
        sums = other.step(batch).sums
        losses.append(sums[0] / sums[1])
    np.testing.assert_allclose(arrays["losses"][:7], losses, rtol=1e-6)
    assert arrays["start_losses"][0] == arrays["losses"][0]
    np.testing.assert_array_equal(arrays["rates"], growing_rates()[: len(arrays["losses"])])


def test_a_run_after_the_test_is_the_run_without_it():
    plain = ready(dropout=0.3)[1].run(ROWS, 3e-3, seed=5)
    _, trainer = ready(dropout=0.3)
    measure_rates(trainer, ROWS, seed=1)
    again = trainer.run(ROWS, 3e-3, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(plain.weights, again.weights, strict=True))


def test_it_ends_where_the_loss_goes_astray_or_the_time_is_over():
    _, trainer = ready()
    arrays, _ = measure_rates(trainer, ROWS, seed=5, rates=growing_rates(100, 1e-3, 1e3))
    smoothed = RateTest("x", **arrays).smoothed
    assert len(smoothed) < 100 and smoothed[-1] > 4 * smoothed.min() > smoothed[-2]
    arrays, _ = measure_rates(trainer, ROWS, seed=5, stop=lambda: True)
    assert len(arrays["losses"]) == 1
    trainer.start = [value * np.float32(np.nan) for value in trainer.start]
    with pytest.raises(NotFinite):
        measure_rates(trainer, ROWS, seed=5)


def test_a_stage_trains_at_the_rate_found_and_a_resumed_run_at_the_same(data, tmp_path):  # noqa: F811
    stage = dataclasses.replace(STRONG, find_rate=True, epochs=2)
    plan = Plan("small", Recipe("own", (PROBE, stage)), augment="none", features="last", image_size=16)
    found = []
    for _ in range(2):
        from small_networks import norm_model

        journal = Journal(tmp_path)
        outcome = run_stages(norm_model(4), plan, (PROBE, stage), data, auto_depth=1, journal=journal)
        (test,) = outcome.rate_tests
        told = outcome.selection["tune"]
        assert told["found"] == test.suggestions and told["learning_rate"] == test.suggestions["rate"]
        assert {entry["learning_rate"] for entry in outcome.history if entry["stage"] == "tune"} == {
            told["learning_rate"]
        }
        found.append(test)
    np.testing.assert_array_equal(found[0].losses, found[1].losses)
    assert any("range test" in name for name in journal.resumed)


def test_the_curve_is_written_as_numbers_and_as_a_picture(tmp_path):
    rates = growing_rates()
    losses = 1 + (np.log10(rates) + 2) ** 2 / 16
    starts = np.random.default_rng(0).normal(2, 0.5, 100)  # batches differ by more than what training does
    tests = [
        RateTest("first", rates, losses + starts - 2, starts),
        RateTest("second", rates[:20], losses[:20] + starts[:20] - 2, starts[:20]),
    ]
    write_rate_tests(tmp_path, tests)
    with (tmp_path / "lr_find.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120 and [row["stage"] for row in rows[99:101]] == ["first", "second"]
    numbers = [float(rows[50][key]) for key in ("learning_rate", "loss", "start_loss", "smoothed_loss")]
    smoothed = starts.mean() + smooth(losses - 2)
    assert numbers == pytest.approx([rates[50], losses[50] + starts[50] - 2, starts[50], smoothed[50]], rel=1e-5)
    picture = np.asarray(Image.open(tmp_path / "lr_find.png"))
    assert picture.shape == (960, 900, 3)
    upper = picture[:480]
    blue = np.argwhere((upper == [int(BLUE[at : at + 2], 16) for at in (1, 3, 5)]).all(2))
    green = np.argwhere((upper == [int(GREEN[at : at + 2], 16) for at in (1, 3, 5)]).all(2))
    lowest = blue[blue[:, 0].argmax(), 1]  # rows go downwards: the least smoothed loss
    share = (np.log10(rates[smooth(losses)[5:].argmin() + 5]) + 6) / 6
    assert lowest == pytest.approx(70 + share * (900 - 35 - 70), abs=15)
    assert np.bincount(green[:, 1]).argmax() == pytest.approx(70 + (share - 1 / 6) * (900 - 35 - 70), abs=3)


def test_what_batches_differ_by_is_taken_out():
    """The start losses are those of the same batches, views and dropout with no step taken."""
    _, trainer = ready(dropout=0.3, views=("plain", "mirror"))
    arrays, _ = measure_rates(trainer, ROWS, seed=5)
    gone = arrays["losses"] - arrays["start_losses"]
    assert np.abs(gone[:20]).max() < 0.02 * arrays["start_losses"].std()  # rates of a millionth do nothing yet
    assert gone.min() < -0.1

import dataclasses
import itertools

import pytest

from tfxfer.train.budget import LEFT_OUT, SAFETY, Pace, Work, plan_stage, planned_rates, priced, shared

# 10 epochs of 5 steps on 150 images, 40 judged; the refit on 190 images takes 6 steps an epoch.
WORK = Work(epochs=10, num_rates=3, folds=((150, 40),), num_all=190, batch_size=32)
PACE = Pace(step_seconds=2.0, held_seconds=0.05, compile_seconds=7.0)
# An epoch is 5 * 2 s + 40 * 0.05 s = 12 s; a run of 10 is judged once more at the end: 122 s.
# The refit of 10 epochs is one of 3: 3 * 6 * 2 s = 36 s.
FOLDS = Work(epochs=10, num_rates=2, folds=((64, 40), (96, 20), (64, 40)), num_all=100, batch_size=32, goes_on=False)
# Runs: 10 * (2 * 2 + 2) + 2 = 62 s, 10 * (3 * 2 + 1) + 1 = 71 s, 62 s; the refit 10 * 4 * 2 = 80 s.


def test_a_plan_costs_its_steps_and_what_is_judged():
    plan = priced(WORK, PACE, 10, 3, 1, True)
    assert (plan.seconds, plan.refit_seconds) == pytest.approx((3 * 122, 36))
    tested = priced(dataclasses.replace(WORK, num_test_steps=30), PACE, 10, 3, 1, True)
    assert (tested.seconds, tested.refit_seconds) == pytest.approx((3 * 122 + 60, 36))
    plan = priced(WORK, PACE, 4, 1, 1, False)
    assert (plan.seconds, plan.refit_seconds) == pytest.approx((4 * 12 + 2, 0))


def test_of_folds_only_the_first_tries_rates_and_the_refit_begins_anew():
    plan = priced(FOLDS, PACE, 10, 2, 3, True)
    assert (plan.seconds, plan.refit_seconds) == pytest.approx((62 * 2 + 71 + 62, 80))
    assert priced(FOLDS, PACE, 10, 1, 2, True).seconds == pytest.approx(62 + 71)
    again = priced(dataclasses.replace(FOLDS, recompiles=True), PACE, 10, 2, 3, True)
    assert again.refit_seconds == pytest.approx(87)


@pytest.mark.parametrize(
    ("seconds", "does"),
    [
        (float("inf"), (10, 3, 1, True)),
        (402, (10, 3, 1, True)),  # 3 * 122 + 36
        (401, (10, 2, 1, True)),
        (279, (10, 1, 1, True)),  # less than 2 * 122 + 36
        (158, (10, 1, 1, True)),  # 122 + 36
        (157, (9, 1, 1, True)),  # 9 * 12 + 2 + 36
        (62, (3, 1, 1, True)),  # 3 * 12 + 2, and two epochs of 12 s
        (61, (4, 1, 1, False)),  # the refit would leave less than a third of the epochs
        (14, (1, 1, 1, False)),
        (13.9, (0, 0, 0, False)),
        (0, (0, 0, 0, False)),
    ],
)
def test_what_fits_by_hand(seconds, does):
    plan = plan_stage(WORK, PACE, seconds * SAFETY + 1e-9)
    assert (plan.epochs, plan.num_rates, plan.num_folds, plan.refit) == does
    assert plan.left_out == (does[0] == 0)


@pytest.mark.parametrize(
    ("seconds", "does"),
    [
        (337, (10, 2, 3, True)),  # 2 * 62 + 71 + 62 + 80
        (336, (10, 1, 3, True)),
        (274, (10, 1, 2, True)),  # less than 62 + 71 + 62 + 80
        (212, (10, 1, 1, True)),
        (141, (9, 1, 1, True)),  # less than 62 + 80
        (16, (1, 1, 1, True)),  # 6 + 2, and 8
        (15.9, (0, 0, 0, False)),  # models of folds without a refit are worth nothing
    ],
)
def test_what_fits_of_folds_by_hand(seconds, does):
    plan = plan_stage(FOLDS, PACE, seconds * SAFETY + 1e-9)
    assert (plan.epochs, plan.num_rates, plan.num_folds, plan.refit) == does


@pytest.mark.parametrize(
    "work", [WORK, FOLDS, dataclasses.replace(WORK, epochs=1), dataclasses.replace(FOLDS, epochs=2)]
)
def test_no_plan_takes_more_than_there_is_and_more_time_never_buys_less(work):
    plans = [plan_stage(work, PACE, seconds) for seconds in range(0, 500, 3)]
    for seconds, plan in zip(range(0, 500, 3), plans, strict=True):
        assert (plan.seconds + plan.refit_seconds) * SAFETY <= seconds
    for less, more in itertools.pairwise(plans):
        assert less.epochs * less.num_rates * less.num_folds <= more.epochs * more.num_rates * more.num_folds or (
            more.refit and not less.refit
        )
    assert plans[0] == LEFT_OUT and plans[-1].epochs == work.epochs


def test_stages_share_by_what_they_would_take():
    short = dataclasses.replace(WORK, epochs=5)  # 3 * 62 s and a refit of two epochs, 24 s
    assert shared(100.0, [WORK, short], PACE) == pytest.approx(100 * 402 / (402 + 210))
    assert shared(100.0, [short], PACE) == 100.0
    assert shared(float("inf"), [WORK, short], PACE) == float("inf")


@pytest.mark.parametrize(
    ("count", "tried"),
    [(4, (8, 4, 2, 1)), (3, (4, 2, 1)), (2, (4, 2)), (1, (2,))],
)
def test_rates_around_the_middle_stay(count, tried):
    assert planned_rates((2.0, 8.0, 1.0, 4.0), count) == tried

"""Every score of sources: better sources score higher, the order of images and the names of classes do not matter."""

import numpy as np
import pytest

from tfxfer.errors import InputError
from tfxfer.select.scores import SCORES

# What it reads, as words of its errors.
READS = {"h_score": "features", "knn": "features", "leep": "probabilities", "logme": "features"}


def source(signal: float, num: int = 80, width: int = 8, dtype=np.float64, seed: int = 0):
    """What a source would give: features, probabilities, and the images' labels."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(num) % 4)
    features = signal * np.eye(width)[labels % width] + random.normal(0, 1, (num, width))
    chances = np.exp(features) / np.exp(features).sum(1, keepdims=True)
    return {
        "labels": labels,
        "features": features.astype(dtype),
        "probabilities": chances.astype(dtype),
        "groups": None,
    }


def test_every_score_is_listed_here():
    assert set(READS) == set(SCORES)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(("num", "width"), [(80, 8), (40, 100)])
def test_a_better_source_scores_higher(name, num, width):
    worst, middle, best = (SCORES[name](**source(signal, num, width)) for signal in (0.0, 2.5, 12.0))
    assert worst < middle < best
    assert type(best) is float and np.isfinite([worst, middle, best]).all()


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(("num", "width"), [(80, 8), (40, 100)])
def test_the_order_of_images_and_the_names_of_classes_do_not_matter(name, num, width):
    given = source(1.5, num, width)
    score = SCORES[name](**given)
    order = np.random.default_rng(1).permutation(num)
    moved = {key: None if value is None else value[order] for key, value in given.items()}
    assert SCORES[name](**moved) == pytest.approx(score, abs=1e-8)
    renamed = {**given, "labels": np.array([70, 3, 0, 11])[given["labels"]]}
    assert SCORES[name](**renamed) == pytest.approx(score, abs=1e-8)


@pytest.mark.parametrize("name", SCORES)
def test_single_precision_is_enough_and_nothing_that_is_given_is_changed(name):
    single, double = source(1.5, dtype=np.float32), source(1.5)
    before = {key: None if value is None else value.copy() for key, value in single.items()}
    assert SCORES[name](**single) == pytest.approx(SCORES[name](**double), abs=1e-4)
    for key, value in before.items():
        np.testing.assert_array_equal(single[key], value)


@pytest.mark.parametrize("name", SCORES)
def test_two_images_and_images_that_are_all_alike_have_a_score(name):
    two = {"features": [[1.0, 2.0], [2.0, 1.0]], "probabilities": [[0.9, 0.1], [0.2, 0.8]], "groups": None}
    assert np.isfinite(SCORES[name]([0, 1], **two))
    alike = {"features": np.full((9, 3), 0.1), "probabilities": np.full((9, 3), 1 / 3), "groups": None}
    assert np.isfinite(SCORES[name](np.arange(9) % 3, **alike))


@pytest.mark.parametrize("name", SCORES)
def test_what_cannot_be_scored_is_refused_in_a_sentence(name):
    given, reads = source(1.0), READS[name]

    def refused(match, **changed):
        with pytest.raises(InputError, match=match) as found:
            SCORES[name](**{**given, **changed})
        assert str(found.value).endswith(".") and "\n" not in str(found.value)

    labels = given["labels"]
    refused("All 80 labels are 2; a source can only be judged on two classes or more", labels=np.full(80, 2))
    refused(f"80 rows of {reads} need labels", labels=labels[:-1])
    refused(r"labels must be at least 0; label 7 is -1", labels=np.where(np.arange(80) == 7, -1, labels))
    refused("labels must be whole numbers, not float64", labels=labels + 0.5)
    refused(f"{reads} must be .* not \\(80, 8, 1\\)", **{reads: given[reads][..., None]})
    refused(f"{reads} must be .* not \\(0, 8\\)", **{reads: given[reads][:0], "labels": labels[:0]})
    for bad in (np.nan, np.inf):
        broken = given[reads].copy()
        broken[5, 2] = bad
        refused(f"Row 5 of the {reads} holds a value that is not finite", **{reads: broken})

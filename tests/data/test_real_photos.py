"""The real data sets: counts by their SOURCE.txt, near-duplicates as looked at, no merging, no crossing."""

import pytest

from tfxfer.data import load_data


def test_clothing(shared_data):
    data = load_data(shared_data("clothing"))
    counts = data.counts()
    assert {name: counts["train"][name] + counts["val"][name] for name in data.class_names} == dict.fromkeys(
        data.class_names, 65
    )
    assert list(counts["test"].values()) == [15, 12, 30, 30, 30, 26, 30, 30, 12, 30]
    assert data.class_names[:2] == ("dress", "hat") and data.num_classes == 10
    assert not data.quarantined and not data.leaks and not data.near_duplicates
    assert 0.15 < len(data.part("val")) / 650 < 0.25


def test_trashnet_has_bursts_of_the_same_object(shared_data):
    data = load_data(shared_data("trashnet"))
    assert sum(map(len, data.parts.values())) == 2524 and not data.leaks
    assert {len(ids) for ids in data.near_duplicates} == {2}
    assert 15 <= len(data.near_duplicates) <= 30  # all looked at: twice the same object in the same place
    assert all(a.split("/")[1] == b.split("/")[1] for a, b in data.near_duplicates)
    assert 5 <= len(data.summary()["near_duplicates_across_parts"]) <= 12


@pytest.mark.parametrize("alphabet", ["Latin", "Greek"])
def test_drawings_are_not_merged(shared_data, alphabet):
    data = load_data(shared_data("omniglot_small1") / alphabet)
    assert len(data) == 20 * data.num_classes
    assert len(data.near_duplicates) <= 1

import json

import pytest

from tfxfer.errors import InputError
from tfxfer.runtime.cluster import cluster_for, read_cluster


def told(cluster, kind="worker", index=0) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


def test_the_chief_is_the_first_worker_or_the_job_of_that_name():
    two = read_cluster(told({"worker": ["a:1", "b:1"]}, index=1))
    assert two is not None and two.addresses == ("a:1", "b:1") and two.index == 1 and not two.is_chief
    named = {"chief": ["c:1"], "worker": ["a:1", "b:1"]}
    chief, worker = read_cluster(told(named, "chief")), read_cluster(told(named, "worker"))
    assert chief is not None and chief.is_chief and chief.addresses == ("c:1", "a:1", "b:1")
    assert worker is not None and worker.index == 1


@pytest.mark.parametrize("environment", [{}, {"TF_CONFIG": ""}, {"TF_CONFIG": "{}"}, told({"worker": ["a:1"]})])
def test_one_worker_is_no_cluster(environment):
    assert read_cluster(environment) is None


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"TF_CONFIG": "{worker"}, r"TF_CONFIG must look like .*not '\{worker'"),
        ({"TF_CONFIG": "[1]"}, "TF_CONFIG must look like"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}}'}, "TF_CONFIG must look like"),
        (told({"worker": ["a:1", "b:1"]}, index=2), "worker 2, which its cluster does not have"),
        (told({"worker": ["a:1", "b:1"]}, "chief"), "chief 0, which its cluster does not have"),
        (told({"worker": ["a:1", "b:1"], "ps": ["p:1"]}), "names the job 'ps'"),
        (told({"worker": ["a:1", "a:1"]}), "must name each worker once"),
    ],
)
def test_what_is_wrong_is_refused(environment, sentence):
    with pytest.raises(InputError, match=sentence):
        read_cluster(environment)


def test_which_strategies_want_a_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert cluster_for("auto") is None and cluster_for("none") is None and cluster_for(object()) is None
    with pytest.raises(InputError, match=r"'multi_worker' wants several workers; set TF_CONFIG on each machine"):
        cluster_for("multi_worker")
    with pytest.raises(InputError, match="strategy must be one of auto, none, mirrored, multi_worker"):
        cluster_for("many")
    monkeypatch.setenv("TF_CONFIG", told({"worker": ["a:1", "b:1"]}, index=1)["TF_CONFIG"])
    for strategy in ("auto", "multi_worker"):
        found = cluster_for(strategy)
        assert found is not None and found.index == 1
    assert cluster_for("none") is None and cluster_for("mirrored") is None

"""What throughput.py and scaling.py conclude, from numbers worked out by hand; their processes and photos, small."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scaling
import scaling_tables
import throughput_tables
from drawn_photos import write_photos
from memory import run_measured
from PIL import Image
from workers import Worker, all_ended, alternate, environment_of

PEERS = Path(__file__).parent / "peers"


def arm(*rates: float, **facts) -> dict:
    in_cpu = [rate / 2 for rate in rates]
    return {
        "rates": list(rates),
        "cpu_rates": in_cpu,
        "peak_rss_bytes": 3_000_000,
        "peak_anonymous_bytes": 2_000_000,
        "facts": facts,
    }


EXTRACTION = {
    "tfxfer, from files": arm(45, 30, 40),
    "tfxfer, decoded": arm(80, 99, 90),
    "Pillow, one thread": arm(50, 50, 50),  # 0.02 s an image; on two cores 100 a second
    "onnxruntime, tfxfer's file": arm(100, 100, 100),
    "onnxruntime, Keras' file": arm(90, 300, 90),
}
STEPS = [
    {"frozen": "nothing", "batch_norm": "train",
     "arms": {"tfxfer": arm(9, 9.7), "Keras fit": arm(5, 5), "torch": arm(10, 10)}},
    {"frozen": "block_12", "batch_norm": "frozen",
     "arms": {"tfxfer": arm(20, 20), "tfxfer, cached": arm(62, 60, bytes_an_image=38_400), "Keras fit": arm(20, 20)}},
]  # fmt: skip


def test_extraction_is_a_share_of_what_the_better_bare_file_allows():
    files, decoded = throughput_tables.goals_of_extraction("net", EXTRACTION, cores=2)
    # 1 / (1/100 + 0.02/2) is 50 images a second
    assert (files["median"], files["low"], files["high"]) == (0.8, 0.6, 0.9) and not files["met"]
    assert decoded["median"] == 0.9 and decoded["met"]


def test_steps_are_compared_within_rounds():
    whole, cached = throughput_tables.goals_of_steps(STEPS)
    assert whole["median"] == 0.935 and not whole["met"] and whole["wanted"] == 0.95
    assert cached["median"] == 3.05 and cached["met"] and cached["wanted"] == 3.0


def test_tables_of_throughput():
    goals = throughput_tables.goals_of_steps(STEPS)
    text = throughput_tables.as_markdown({
        "date": "2026-01-02", "cores": 2, "threads": 2, "rounds": 3, "load_average": [0.1, 2], "commit": "abc",
        "versions": {"torch": "9"}, "goals": goals, "steps": STEPS, "quick": True,
        "extraction": [{"source": "net", "image_size": 96, "arms": EXTRACTION}],
    })  # fmt: skip
    assert "| net, 96 px | tfxfer, from files | 40 (30 to 45) | 20 | 3 MB | 2 MB |" in text
    assert "| block_12, BatchNorm frozen | tfxfer, cached | 61 (60 to 62) | 30 | 38 kB | 3 MB | 2 MB |" in text
    assert "| 3.05 (3.00 to 3.10) | 3.05 | 3 | met |" in text and "torch 9" in text and "With --quick" in text


def memory_of(images: int, rss: float, own: float, child: float) -> dict:
    return {
        "images": images, "peak_rss_bytes": rss * 1e6, "peak_anonymous_bytes_of_command": own * 1e6,
        "peak_anonymous_bytes_of_child": child * 1e6, "peak_anonymous_bytes": 7e6,
        "wall_seconds": 3.2, "cpu_seconds": 5,
    }  # fmt: skip


def test_tables_of_scaling():
    used = [memory_of(10, 100, 50, 80), memory_of(200, 109, 60, 88)]
    goals = scaling_tables.goals_of_memory(used)
    assert [goal["value"] for goal in goals] == [1.09, 1.2, 1.1]
    assert [goal["met"] for goal in goals] == [True, False, True]
    row = {
        "varied": "epochs", "value": 8, "wall_seconds": 20.4, "cpu_seconds": 31, "stored_bytes": 5e6,
        "peak_rss_bytes": 9e8, "seconds": {"read_data": 1.26, "train.features": 2},
    }  # fmt: skip
    text = scaling_tables.as_markdown({
        "date": "2026-01-02", "cores": 2, "load_average": [0.1, 2], "commit": "abc", "versions": {"python": "3"},
        "costs": [row], "memory": used, "memory_command": "tfxfer train DATA", "goals": goals, "quick": False,
    })  # fmt: skip
    assert "| epochs | 8 | 20 | 31 | 1.3 | 2.0 | 5 | 900 |" in text
    assert "| 200 | 109 MB | 60 MB | 88 MB | 7 MB | 3 | 5 |" in text and "| 1.20 | 1.1 | missed |" in text
    assert scaling_tables.goals_of_memory(used[:1]) == []


def test_the_base_is_run_once_and_workers_have_a_cluster(monkeypatch):
    ran = []

    def run(bench, name, value):
        ran.append((name, value))
        return {"varied": name, "value": value}

    monkeypatch.setattr(scaling, "cost", run)
    rows = scaling.costs(None, {"images": (500, 1000), "epochs": (4, 8), "devices": (1, 2), "freeze_depth": (0,)})
    assert ran == [("images", 500), ("images", 1000), ("epochs", 8), ("devices", 2), ("freeze_depth", 0)]
    assert {"varied": "devices", "value": 1} in rows and len(rows) == 7
    one, two = (json.loads(told["TF_CONFIG"]) for told in scaling.cluster_variables(2))
    assert one["cluster"] == two["cluster"] and len(set(one["cluster"]["worker"])) == 2
    assert (one["task"]["index"], two["task"]["index"]) == (0, 1) and scaling.cluster_variables(1) == [{}]


def test_a_command_is_measured(tmp_path):
    code = "import sys, time; x = b'1' * 100_000_000; print('done'); time.sleep(0.3); sys.exit(3)"
    use = run_measured([sys.executable, "-c", code], tmp_path / "log")
    assert use.status == 3 and (tmp_path / "log.out").read_text() == "done\n"
    assert 1e8 < use.peak_rss_bytes < 1.5e8 and use.wall_seconds > 0 and use.cpu_seconds > 0
    child = "import time; x = b'1' * 50_000_000; time.sleep(0.3)"
    parent = f"import subprocess, sys; y = b'1' * 30_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    use = run_measured([sys.executable, "-c", parent], tmp_path / "log")
    assert use.peak_anonymous_bytes > 8e7 and 3e7 < use.peak_anonymous_bytes_of_command < 5e7
    assert 5e7 < use.peak_anonymous_bytes_of_child < 7e7


def test_workers_take_turns(tmp_path):
    Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / "one.png")
    told = {"files": [str(tmp_path / "one.png")], "image_size": 16}
    with all_ended({}) as workers:
        for name in "ab":
            path = tmp_path / f"{name}.log"
            workers[name] = Worker(
                Path(sys.executable), PEERS / "pillow_speed.py", told, path, environment_of(1, "")
            )  # fmt: skip
            workers[name].ready()
        found = alternate(workers, 3, 0.02)
    assert all(len(found[name]["rates"]) == 3 and min(found[name]["rates"]) > 100 for name in "ab")
    assert found["a"]["peak_rss_bytes"] > 5e6
    (tmp_path / "bad.json").write_text("{}")
    failing = Worker(Path(sys.executable), PEERS / "pillow_speed.py", {}, tmp_path / "bad.log", environment_of(1, ""))
    with pytest.raises(RuntimeError, match=r"ended with status 1(.|\n)*KeyError"):
        failing.ready()


def test_drawn_photos_are_all_different(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "from" / label).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(256, size=(40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "from" / label / f"{number}.png")
    found = [write_photos(tmp_path / "from", tmp_path / name, 10, 32, seed=3) for name in ("one", "two")]
    files = [sorted(folder.glob("*/*.jpg")) for folder in found]
    contents = [[file.read_bytes() for file in one] for one in files]
    assert [file.parent.name for file in files[0]] == ["cat"] * 5 + ["dog"] * 5
    assert len(set(contents[0])) == 10 and contents[0] == contents[1]
    assert Image.open(files[0][0]).size == (32, 32)

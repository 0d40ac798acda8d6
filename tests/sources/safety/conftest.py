"""The corpus: every hostile file is built once, and judged once in a process of its own that is timed and weighed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

JUDGE = """
import json, sys, time
import h5py, numpy, google.protobuf.message
import tfxfer.sources.safety as gate
from tfxfer.errors import InputError

def status_bytes(key):
    # Not ru_maxrss, which a process inherits from the one that started it.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

before, verdicts = status_bytes("VmRSS"), {}
for name, path in json.load(sys.stdin).items():
    forget_peak()
    begin = time.process_time()
    try:
        gate.check_model_file(path)
        kind, message = "passed", ""
    except InputError as error:
        kind, message = "refused", str(error)
    except BaseException as error:
        kind, message = type(error).__name__, str(error)
    verdicts[name] = {"kind": kind, "message": message, "seconds": time.process_time() - begin,
                      "memory_bytes": status_bytes("VmHWM") - before}
imported = [name for name in ("tensorflow", "keras", "torch") if name in sys.modules]
print(json.dumps({"verdicts": verdicts, "imported": imported}))
"""


def judge(paths: dict[str, Path]) -> dict:
    """What the gate says of each file; in a process without TensorFlow."""
    done = subprocess.run(
        [sys.executable, "-c", JUDGE],
        input=json.dumps({name: str(path) for name, path in paths.items()}),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Path and canary of every hostile file."""
    import hostile_files
    import hostile_h5
    import hostile_keras
    import hostile_saved_model
    import hostile_saved_model_edited

    home = tmp_path_factory.mktemp("hostile")
    files = {}
    for module in (hostile_keras, hostile_h5, hostile_saved_model, hostile_saved_model_edited, hostile_files):
        for name, (build, _) in module.CASES.items():
            folder = home / name
            folder.mkdir()
            canary = home / f"canary-{name}"
            files[name] = build(folder, canary), canary
            assert not canary.exists(), f"building {name} ran its code"
    return files


@pytest.fixture(scope="session")
def verdicts(hostile) -> dict:
    return judge({name: path for name, (path, _) in hostile.items()})

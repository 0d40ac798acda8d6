"""Run by `runtimes.Reopened` as a program of its own: reopen one artifact in its runtime and compute what is asked.

Usage: python -P reopen.py reopen_FORMAT.py, then one JSON object on stdin. reopen_FORMAT.py has
    ABSENT                  packages that a server lacks; importing one raises ImportError here
    import_runtime()        imports the runtime, at once: it may take seconds, while the artifact is being written
    open_artifact(runtime, path) -> (name and version, class names, predict), where predict is
        {"images": f, "bytes": f} as far as the format has them; f(batch) -> (probabilities, classes)
Nothing of this imports tfxfer: an artifact that needs it is not finished.
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    """Do what the request on stdin says; results go to its folder."""
    program = runpy.run_path(sys.argv[1])
    for name in program["ABSENT"]:
        sys.modules[name] = None  # type: ignore[assignment]
    runtime = program["import_runtime"]()
    request = json.loads(sys.stdin.readline())
    runtime_name, class_names, predict = program["open_artifact"](runtime, request["artifact"])
    folder, results = Path(request["folder"]), Path(request["results"])
    done = []
    for task in request["tasks"]:
        if task["kind"] in predict:
            probabilities, classes = _in_batches(predict[task["kind"]], _read(folder, task), task["batch_size"])
            np.savez(results / f"{task['name']}.npz", probabilities=probabilities, classes=classes)
            done.append(task["name"])
    result = {"runtime": runtime_name, "class_names": class_names, "done": done}
    (results / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _read(folder, task):
    arrays = [np.load(folder / file, mmap_mode="r") for file in task["files"]]
    return [array.tobytes() for array in arrays] if task["kind"] == "bytes" else arrays[0][: task["count"]]


def _in_batches(predict, items, batch_size):
    pieces = [predict(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    return np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces])


if __name__ == "__main__":
    main()

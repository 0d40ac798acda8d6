"""One training of scaling.py in a process of its own: `tfxfer train` without exports, which scale with nothing here.

    python tests/benchmarks/train_once.py DATA OUT '{"source": "mobilenet_v2_imagenet", ...}' [STRATEGY [DEVICES]]

The third argument is what `make_plan` takes. STRATEGY is that of `--strategy`; DEVICES logical CPUs are made before.
With multi_worker, one such process runs for each worker of TF_CONFIG; the chief's alone writes to OUT.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tfxfer.cli.show import Live
from tfxfer.workflow.planning import make_plan
from tfxfer.workflow.start import train_early


def main() -> int:
    data, out, plan = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    strategy = sys.argv[4] if len(sys.argv) > 4 else "none"
    num_devices = int(sys.argv[5]) if len(sys.argv) > 5 else 1

    def work(devices: Any) -> Any:
        with Live() as progress:
            return train_early(
                data, make_plan(None, **plan), out=out, split=None, progress=progress, formats=(), strategy=devices
            )

    if strategy == "multi_worker":
        from tfxfer.workflow.start import decide_always_alike
        from tfxfer.workflow.together import together

        decide_always_alike()
        together(strategy, work)
        return 0
    if num_devices > 1:
        _make_devices(num_devices)
    work(strategy)
    return 0


def _make_devices(count: int) -> None:
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)


if __name__ == "__main__":
    sys.exit(main())

"""One job of several processes: the chief does it, the others help, and all end alike."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfxfer.errors import CheckError, InputError, Interrupted, Terminated
from tfxfer.runtime.cluster import cluster_for
from tfxfer.runtime.process import ended_by
from tfxfer.runtime.progress import Progress
from tfxfer.train.crew import Member
from tfxfer.train.distribute import Devices, choose_devices
from tfxfer.workflow.run import Run

ENDS: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (InputError, CheckError, Interrupted, Terminated, KeyboardInterrupt)
}


def together(strategy: Any, work: Callable[[Devices], Run], progress: Progress | None = None) -> Run:
    """Do the work where this process is the chief, or the only one; else help until the chief has done it.

    Args:
        strategy: As `choose_devices` takes it.
        work: What gives the run.
        progress: Told whom this process waits for; silence by default.

    Returns:
        The run. A helper's has the chief's path, which may be on another machine.

    Raises:
        InputError, CheckError, Interrupted, Terminated: What the work raises, on all workers.
        WorkerLost: Where another worker is gone.
    """
    cluster = cluster_for(strategy)
    if cluster is not None:
        others = [address for index, address in enumerate(cluster.addresses) if index != cluster.index]
        (progress or Progress()).phase(f"waiting for the other workers, {', '.join(others)}; Ctrl-C gives up")
    devices = choose_devices(strategy)
    if devices.member is not None:
        return _help(devices.member)
    if devices.crew is None:
        return work(devices)
    try:
        run = work(devices)
    except BaseException as error:
        kind = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ENDS), CheckError.__name__)
        devices.crew.end({"error": kind, "sentence": f"Worker 0 ended: {str(error) or type(error).__name__}"})
        raise
    devices.crew.end({"path": str(run.path.absolute()), "info": run.info})
    return run


def _help(member: Member) -> Run:
    with ended_by(signal.SIGINT):
        told = member.serve()
    if "error" in told:
        raise ENDS[told["error"]](told["sentence"])
    return Run(Path(told["path"]), told["info"])

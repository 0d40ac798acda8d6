"""Search, then train the winner as `fit` trains it."""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

from tfxfer.data import Dataset
from tfxfer.errors import InputError
from tfxfer.runtime.progress import Lines, Progress
from tfxfer.specs import Plan, Source
from tfxfer.train.lock import training_lock
from tfxfer.tuning.space import KEYS, Space
from tfxfer.workflow.members import is_child, role
from tfxfer.workflow.planning import make_plan, source_of
from tfxfer.workflow.run import RUN_FILE, Run, load_run, new_run_folder, write_info
from tfxfer.workflow.searching import SEARCH_FOLDER, Options, Searcher
from tfxfer.workflow.start import decide_always_alike, read_data
from tfxfer.workflow.training import FORMATS, train


def search(
    data: Any,
    sources: str | Sequence[str] = "efficientnet_lite0_imagenet",
    *,
    space: Space | None = None,
    keys: Sequence[str] = KEYS,
    tuner: str = "hyperband",
    trials: int = 20,
    epochs: int = 0,
    finalists: int = 3,
    repeats: int = 2,
    stop_early: bool = True,
    image_size: int | None = None,
    batch_size: int | None = None,
    metric: str | None = None,
    seed: int | None = None,
    val_fraction: float | None = None,
    group_by: str | None = None,
    near_duplicates: str | None = None,
    time_limit: float = 0.0,
    baseline: str | None = None,
    split: str | Path | None = None,
    formats: Sequence[str] = FORMATS,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    members: Callable[[Path], None] | None = None,
) -> Run | None:
    """Search freeze depth, rates and more with a tuner of KerasTuner, and train the winner as `fit` does.

    Trials share what frozen blocks compute, and heads start from the solution on the same features. What is chosen is
    chosen on the validation part: depths within one standard error of the best count as equal, the best of them are
    trained again with other seeds, and of those that stay equal the one that trains the fewest parameters is taken.
    It is then trained on train and validation part, scored once on the test part, exported, verified and judged.

    Args:
        data: As `load_data` takes it, or a Dataset.
        sources: Name of a source, or several to choose among.
        space: A function from `keras_tuner.HyperParameters` to a `Plan`; `keys` of the default space otherwise.
        keys: What the default space varies, see `tfxfer.tuning.space.default_space`.
        tuner: "hyperband", "random", "bayesian" or "grid".
        trials: At most so many; 20 by default.
        epochs: Of a trial, and of Hyperband's longest; 0: as many as the recipe says.
        finalists, repeats: So many of the equal ones are trained so many times again.
        stop_early: Stop a trial that is behind the median of the others.
        image_size, batch_size, metric, seed, val_fraction, group_by, near_duplicates, baseline, split, formats: As
            `fit` has them.
        time_limit: Seconds for everything; trials get six tenths of it. 0: none.
        out: Folder of the run; the next free `runs/DATA-N` by default.
        resume: Go on with the search in `out`: finished trials are not computed again.
        progress: Told about phases and trials; lines on stderr by default.
        members: Has other processes run the trials of the search in the folder that it is given; `tfxfer search
            --workers` does so.

    Returns:
        The run; None in a process of several that only runs trials (`KERASTUNER_TUNER_ID` and the chief's address are
        set, see the README). `run.info["search"]` has the trials' summary, `RUN/search.csv` a row a trial,
        `RUN/search.png` the accuracy over the depth.

    Raises:
        InputError: Where something is unknown or out of range, or the search in `out` was begun otherwise.

    Example:
        >>> run = search("photos/", "mobilenet_v2_imagenet", trials=10, out="runs/search")  # doctest: +SKIP
        >>> run.info["search"]["values"]["freeze_depth"]  # doctest: +SKIP
        15

    Reference:
        Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar. Hyperband: A Novel Bandit-Based Approach to Hyperparameter
        Optimization. JMLR 18, 2018.
    """
    started = time.monotonic()
    options = Options(tuner, trials, epochs, finalists, repeats, stop_early)
    names = [sources] if isinstance(sources, str) else list(sources)
    plan = make_plan(
        source=names[0] if names else None, image_size=image_size, batch_size=batch_size, metric=metric, seed=seed,
        val_fraction=val_fraction, group_by=group_by, near_duplicates=near_duplicates, baseline=baseline,
        time_limit_seconds=time_limit,
    )  # fmt: skip
    cards = [source_of({**plan.to_dict(), "source": name}) for name in names]
    return search_by_plan(
        data, plan, cards, options, space=space, keys=keys, split=split, formats=formats, out=out, resume=resume,
        progress=progress or Lines(), started=started, members=members,
    )  # fmt: skip


def search_by_plan(
    data: Any, plan: Plan, cards: Sequence[Source], options: Options, *, space: Space | None = None,
    keys: Sequence[str] = KEYS, split: str | Path | None = None, formats: Sequence[str] = FORMATS,
    out: str | Path | None = None, resume: bool = False, progress: Progress, started: float,
    members: Callable[[Path], None] | None = None,
) -> Run | None:  # fmt: skip
    """The same where the plan of what is not searched is made.

    Args:
        data, plan, cards, options, space, keys, split, formats, out, resume, progress: As `search` takes or makes them.
        started: `time.monotonic()` that a time limit counts from.
        members: Has other processes run the trials of the search in this folder.

    Returns:
        The run; None in a process that only ran trials.
    """
    decide_always_alike()
    part, child = role(), is_child()
    if part != "alone" and out is None:
        raise InputError("Processes that search together need one folder that all of them see: give --out.")
    folder = Path(out) if out is not None and part != "alone" else _folder(out, data, resume)
    dataset = read_data(data, plan, split, progress)
    for name in ("train", "val", "test"):
        dataset.part(name)
    kept = folder.exists()
    (folder / SEARCH_FOLDER).mkdir(parents=True, exist_ok=True)
    helps = part == "worker" or child
    lock = contextlib.nullcontext() if helps else training_lock(folder / SEARCH_FOLDER)
    try:
        with lock:
            if resume and (folder / RUN_FILE).is_file() and "search" in load_run(folder).info:
                return load_run(folder)
            searcher = Searcher(
                dataset, plan, cards, folder, options, space=space, keys=keys, resume=resume, helps=helps,
                progress=progress, started=started, tries=members and functools.partial(members, folder),
            )  # fmt: skip
            if helps:
                searcher.try_all()
                return None
            return _trained(searcher, dataset, folder, formats, progress, started)
    except InputError:
        if not kept and not any((folder / SEARCH_FOLDER / "trials").glob("*")):
            shutil.rmtree(folder)  # nothing was tried: the name is free again
        raise


def _trained(searcher: Searcher, dataset: Dataset, folder: Path, formats, progress: Progress, started: float) -> Run:
    winner, told = searcher.run()
    keras.backend.clear_session()
    progress.phase("training the winner")
    run = train(
        dataset, winner, out=folder, within=True, resume=(folder / RUN_FILE).is_file(), formats=formats,
        progress=progress, started=started, strategy="none",
    )  # fmt: skip
    run.info["search"] = told
    write_info(folder, run.info)
    return run


def _folder(out: str | Path | None, data: Any, resume: bool) -> Path:
    name = Path(str(data)).name if isinstance(data, str | Path) else getattr(data, "name", "data")
    if out is not None and (Path(out) / SEARCH_FOLDER).is_dir():
        return Path(out)
    if resume:
        raise InputError(f"{out or 'A search without --out'} is no search that was begun; drop --resume to begin one.")
    return new_run_folder(out, name)

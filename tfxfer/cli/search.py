"""`tfxfer search DATA`."""

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer

from tfxfer.cli.show import Live, print_json, print_run, quiet_libraries
from tfxfer.cli.train import END_SECONDS, parse_seconds
from tfxfer.errors import InputError
from tfxfer.runtime.process import end_after_sigterm

NAME = "search"
HELP = "Search freeze depth, rates and more by trials that share what is frozen; then train the winner as `train` does."

Option = typer.Option


def run(
    data: Annotated[
        Path, typer.Argument(help="Folder of class folders (or of train/ test/ val/ that hold those), or a .csv.")
    ],
    source: Annotated[str, Option(help="Name of the pretrained source, or several by comma to choose among.")] = (
        "efficientnet_lite0_imagenet"
    ),
    tuner: Annotated[str, Option(help="hyperband, random, bayesian or grid.")] = "hyperband",
    trials: Annotated[int, Option(help="At most so many.")] = 20,
    search: Annotated[
        str,
        Option(
            help="What varies, by comma: freeze_depth, learning_rate, layer_decay, weight_decay, dropout, head, "
            "augment, image_size."
        ),
    ] = "freeze_depth,learning_rate,layer_decay,weight_decay,dropout",
    epochs: Annotated[int, Option(help="Of a trial; 0: as many as the recipe says.")] = 0,
    finalists: Annotated[int, Option(help="Of the trials that are equal so many are trained again; 0: none.")] = 3,
    repeats: Annotated[int, Option(help="Times that each of them is trained again, with another seed.")] = 2,
    no_early_stop: Annotated[
        bool, Option("--no-early-stop", help="Let trials that are behind the median of the others go on.")
    ] = False,
    image_size: Annotated[int | None, Option(help="Side in pixels that images are resized to.")] = None,
    batch_size: Annotated[int | None, Option(help="Images a step.")] = None,
    seed: Annotated[int | None, Option(help="Of split, choices, shuffle and dropout.")] = None,
    val_fraction: Annotated[
        float | None, Option(help="Share split off for validation where the data brings none.")
    ] = None,
    group_by: Annotated[str | None, Option(help="Regular expression on paths; what it captures names a group.")] = None,
    near_duplicates: Annotated[str | None, Option(help="on, turned or off: what stays together.")] = None,
    metric: Annotated[str | None, Option(help="accuracy, macro_f1 or balanced_accuracy: what is selected for.")] = None,
    split: Annotated[Path | None, Option(help="A split.csv of an earlier run to reuse.")] = None,
    time_limit: Annotated[
        str | None, Option(help="Seconds, or 5m or 1h, for the whole command; trials get six tenths of it.")
    ] = None,
    baseline: Annotated[str | None, Option(help="quick or scratch.")] = None,
    no_baseline: Annotated[bool, Option("--no-baseline", help="Skip the comparison with baselines.")] = False,
    workers: Annotated[
        int, Option(help="Processes on this machine that run trials; more than one have a chief beside them.")
    ] = 1,
    out: Annotated[Path | None, Option(help="Folder of the run; runs/DATA-N by default.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the search in --out.")] = False,
    json: Annotated[bool, Option("--json", help="Print run.json on stdout instead of a table.")] = False,
) -> None:
    quiet_libraries()
    if no_baseline and baseline:
        raise InputError("--baseline and --no-baseline were given both; drop one.")
    if not data.exists():
        raise InputError(f"There is no folder or CSV file {data}; give the one that holds the images.")
    told = "tfxfer: Told to end by SIGTERM; go on with --resume from the last finished trial."
    with end_after_sigterm(END_SECONDS, told), Live() as progress:
        from tfxfer.workflow.members import run_members
        from tfxfer.workflow.search import search as search_here

        members = functools.partial(_members, workers, run_members, progress) if workers != 1 else None
        found = search_here(
            data, [name for name in source.split(",") if name], keys=[key for key in search.split(",") if key],
            tuner=tuner, trials=trials, epochs=epochs, finalists=finalists, repeats=repeats,
            stop_early=not no_early_stop, image_size=image_size, batch_size=batch_size, seed=seed,
            val_fraction=val_fraction, group_by=group_by, near_duplicates=near_duplicates, metric=metric, split=split,
            time_limit=parse_seconds(time_limit) or 0.0, baseline="none" if no_baseline else baseline, out=out,
            resume=resume, progress=progress, members=members,
        )  # fmt: skip
    if found is None:
        return  # another process trains the winner
    print_json(found.info) if json else print_run(found.info, found.path)
    if found.info["baseline"]["verdict"] == "negative":
        raise typer.Exit(1)


def _members(workers: int, run_members, progress, folder: Path) -> None:
    run_members([sys.executable, "-m", "tfxfer", *member_arguments(sys.argv[1:], folder)], workers, progress)


def member_arguments(arguments: list[str], folder: Path) -> list[str]:
    """The same command for a process that only runs trials of the search in a folder.

    Example:
        >>> member_arguments(["search", "photos", "--workers", "2", "--json", "--out=a", "--seed", "3"], Path("b"))
        ['search', 'photos', '--seed', '3', '--out', 'b']
    """
    kept, skip = [], False
    for word in arguments:
        name, _, value = word.partition("=")
        if not skip and name in ("--workers", "--out"):
            skip = not value
            continue
        if not skip and word not in ("--json", "--resume"):
            kept.append(word)
        skip = False
    return [*kept, "--out", str(folder)]

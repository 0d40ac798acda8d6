"""`tfxfer evaluate RUN DATA`."""

from pathlib import Path
from typing import Annotated

import typer

from tfxfer.cli.show import Live, print_json, print_scores, quiet_libraries

NAME = "evaluate"
HELP = "Score a run on labelled images: the test part of a folder that has one, else all of it."


def run(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data: Annotated[Path, typer.Argument(help="Folder of class folders, or a .csv.")],
    group_by: Annotated[str | None, typer.Option(help="Regular expression on paths, for intervals by group.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    quiet_libraries()
    with Live() as progress:
        from tfxfer.workflow.scoring import evaluate

        scores = evaluate(run, data, group_by=group_by, progress=progress)
    if json:
        print_json(scores)
    else:
        print_scores(scores, f"{run} on {data}: {scores['num_images']} images")
        for entry in scores["quarantined"]:
            typer.echo(f"quarantined {entry['path']}: {entry['reason']}", err=True)

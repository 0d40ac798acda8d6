"""`tfxfer predict RUN IMAGES` and `tfxfer predict --source NAME IMAGES`."""

from pathlib import Path
from typing import Annotated

import typer

from tfxfer.cli.show import print_json, quiet_libraries

NAME = "predict"
HELP = "Name what is in images, by a run (its ONNX artifact answers without TensorFlow) or by a source's own classes."


def run(
    paths: Annotated[
        list[Path], typer.Argument(help="Folder of a run (not with --source), then images or folders of images.")
    ],
    source: Annotated[str | None, typer.Option(help="Use a source's original output instead of a run.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes shown for each image.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    quiet_libraries()
    from tfxfer.workflow.scoring import predict_files

    found = predict_files(paths, source=source, top_k=top)
    if json:
        print_json(found)
    else:
        for entry in found["predictions"]:
            typer.echo(
                f"{entry['path']}\t" + "\t".join(f"{c['name']} {c['probability']:.4f}" for c in entry["classes"])
            )
    for entry in found["refused"]:
        typer.echo(f"refused {entry['path']}: {entry['reason']}", err=True)
    if found["refused"]:
        raise typer.Exit(2)

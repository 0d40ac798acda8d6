"""`tfxfer export RUN`."""

from pathlib import Path
from typing import Annotated

import typer

from tfxfer.cli.show import Live, print_json, quiet_libraries, stdout
from tfxfer.cli.verify import table_of
from tfxfer.exporters import EXPORTERS
from tfxfer.registry import lookup

NAME = "export"
HELP = "Export a run again, and certify every artifact in its own runtime."


def run(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    formats: Annotated[
        str, typer.Option(help="Comma-separated: saved_model, onnx. Those that RUN/exports has already are made anew.")
    ] = "saved_model,onnx",
    out: Annotated[Path | None, typer.Option(help="Folder for the artifacts; RUN/exports by default.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Folder of real images to verify with, for a run that keeps none.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    quiet_libraries()
    from tfxfer.workflow.run import load_run

    found = load_run(run)
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    for name in wanted:  # before TensorFlow is imported
        lookup(EXPORTERS, name, "export format")
    with Live() as progress:
        progress.phase("exporting and verifying")
        from tfxfer.workflow.api import export

        certificates = export(found, out, formats=wanted, samples=samples)
    if json:
        print_json([certificate.to_dict() for certificate in certificates])
    else:
        stdout.print(table_of(certificates, str(out or run / "exports")))

"""`tfxfer verify RUN`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tfxfer.cli.show import Live, new_table, print_json, quiet_libraries, stdout
from tfxfer.errors import CheckError
from tfxfer.specs import Certificate

NAME = "verify"
HELP = "Prove again that a run's artifacts are whole and compute what the model computed; exit 1 where not."


def run(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of exports.")],
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference of a probability; 1e-4 by default.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    quiet_libraries()
    from tfxfer.exporters.verify import TOLERANCE, CertificateError
    from tfxfer.workflow.scoring import verify

    certificates: Sequence[Certificate] = ()
    try:
        with Live() as progress:
            progress.phase("reopening the artifacts in their own runtimes")
            certificates = verify(run, tolerance=TOLERANCE if tolerance is None else tolerance)
    except CheckError as error:
        if json:
            found = error.certificates if isinstance(error, CertificateError) else ()
            print_json({"passed": False, "problem": str(error), "certificates": [one.to_dict() for one in found]})
        raise
    if json:
        print_json({"passed": True, "problem": "", "certificates": [one.to_dict() for one in certificates]})
    else:
        stdout.print(table_of(certificates, str(run)))


def table_of(certificates: Sequence[Certificate], title: str) -> Table:
    """A row an artifact."""
    columns = ("artifact", "runtime", "images", "batches", "largest difference", "same first class", "verdict")
    table = new_table(*columns, title=title)
    for c in certificates:
        table.add_row(
            c.path, c.runtime, str(c.num_images), ", ".join(map(str, c.batch_sizes)), f"{c.max_abs_difference:.1e}",
            f"{c.top1_agreement:.3f}", "passed" if c.passed else "FAILED",
        )  # fmt: skip
    return table

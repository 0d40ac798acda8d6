"""`tfxfer demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tfxfer.cli.show import quiet_libraries, stderr
from tfxfer.cli.train import run_training

NAME = "demo"
HELP = "Write the digits that scikit-learn carries as a folder of PNGs, and train on it: the whole path in a minute."


def run(
    source: Annotated[str, typer.Option(help="The pretrained source.")] = "digits_cnn",
    per_class: Annotated[int, typer.Option(min=4, max=100, help="Digits of each class to train on.")] = 10,
    seed: Annotated[int, typer.Option(help="Which digits, and the training.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/digits-N by default.")] = None,
    data_out: Annotated[Path | None, typer.Option(help="Where the PNGs go; beside the run by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print run.json on stdout.")] = False,
) -> None:
    quiet_libraries()
    from tfxfer.workflow.digits import write_digits
    from tfxfer.workflow.planning import make_plan
    from tfxfer.workflow.run import new_run_folder

    options: dict[str, Any] = {"source": source, "seed": seed}
    make_plan(**options)  # what is wrong is refused before anything is written
    folder = new_run_folder(out, "digits")
    data = write_digits(data_out or folder.with_name(folder.name + "-data"), per_class=per_class, seed=seed)
    stderr.print(f"The digits are in {data}; the same run by hand: tfxfer train {data} --source {source}")
    run_training(data, None, options, out=folder, split=None, as_json=json)

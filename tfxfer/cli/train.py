"""`tfxfer train DATA`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tfxfer.cli.show import Live, print_freezing, print_json, print_run, quiet_libraries
from tfxfer.errors import InputError

NAME = "train"
HELP = "Fine-tune a pretrained source on labelled images; score, export, verify and judge the result."

Option = typer.Option


def run(
    data: Annotated[
        Path, typer.Argument(help="Folder of class folders (or of train/ test/ val/ that hold those), or a .csv.")
    ],
    source: Annotated[
        str | None,
        Option(help="Name of the pretrained source (see `tfxfer sources`), or hub:PATH, keras:NAME, FILE.h5 ..."),
    ] = None,
    weights: Annotated[Path | None, Option(help="File with the source's weights, where they are not its own.")] = None,
    input_range: Annotated[
        str | None, Option(help="What the source wants pixels scaled to: 0..255, 0..1, -1..1, imagenet or caffe.")
    ] = None,
    partial: Annotated[
        bool, Option("--partial", help="Load weights in part where not all fit; the report says which.")
    ] = False,
    trust_custom_objects: Annotated[
        list[str] | None, Option(help="Module of your own code that custom objects in a model file may come from.")
    ] = None,
    recipe: Annotated[str | None, Option(help="auto, probe or full.")] = None,
    method: Annotated[str | None, Option(help="fine_tune, or probe (frozen features only).")] = None,
    freeze: Annotated[
        str | None,
        Option(help="Frozen: leading blocks by number, share (0.7), name or all; or re:PATTERN, any layers."),
    ] = None,
    image_size: Annotated[int | None, Option(help="Side in pixels that images are resized to.")] = None,
    epochs: Annotated[int | None, Option(help="Epochs of fine-tuning.")] = None,
    batch_size: Annotated[int | None, Option(help="Images a step.")] = None,
    lr: Annotated[float | None, Option(help="Peak learning rate; by default the best of three, measured.")] = None,
    batch_norm: Annotated[str | None, Option(help="frozen, affine, adapt or train.")] = None,
    augment: Annotated[str | None, Option(help="auto, mirror or none.")] = None,
    dropout: Annotated[float | None, Option(help="Rate before the head.")] = None,
    seed: Annotated[int | None, Option(help="Of split, shuffle and dropout.")] = None,
    val_fraction: Annotated[
        float | None, Option(help="Share split off for validation where the data brings none.")
    ] = None,
    group_by: Annotated[str | None, Option(help="Regular expression on paths; what it captures names a group.")] = None,
    near_duplicates: Annotated[
        str | None, Option(help="on, turned (also turned, mirrored and shifted copies) or off: what stays together.")
    ] = None,
    metric: Annotated[str | None, Option(help="accuracy, macro_f1 or balanced_accuracy: what is selected for.")] = None,
    split: Annotated[Path | None, Option(help="A split.csv of an earlier run to reuse.")] = None,
    time_limit: Annotated[
        str | None, Option(help="Seconds, or 5m or 1h: stops between epochs and finishes properly.")
    ] = None,
    baseline: Annotated[str | None, Option(help="quick or scratch.")] = None,
    no_baseline: Annotated[bool, Option("--no-baseline", help="Skip the comparison with baselines.")] = False,
    seeds: Annotated[int | None, Option(help="Repeat both sides of the comparison so many times.")] = None,
    config: Annotated[Path | None, Option(help="A config.toml to start from; options win over it.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be frozen, layer by layer, and stop.")] = False,
    print_config: Annotated[bool, Option("--print-config", help="Print the resolved config.toml and stop.")] = False,
    out: Annotated[Path | None, Option(help="Folder of the run; runs/DATA-N by default.")] = None,
    resume: Annotated[
        bool, Option("--resume", help="Go on with the run in --out, which was killed, stopped or interrupted.")
    ] = False,
    checkpoint_every: Annotated[
        str | None, Option(help="Seconds, or 5m: what a kill may cost; 30 s by default.")
    ] = None,
    json: Annotated[bool, Option("--json", help="Print run.json on stdout instead of a table.")] = False,
) -> None:
    quiet_libraries()
    if no_baseline and baseline:
        raise InputError("--baseline and --no-baseline were given both; drop one.")
    options: dict[str, Any] = {
        "source": source, "recipe": recipe, "method": method, "freeze_depth": freeze, "image_size": image_size,
        "epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "batch_norm": batch_norm, "augment": augment,
        "dropout": dropout, "seed": seed, "val_fraction": val_fraction, "group_by": group_by,
        "near_duplicates": near_duplicates, "metric": metric,
        "time_limit_seconds": parse_seconds(time_limit), "baseline": "none" if no_baseline else baseline,
        "num_seeds": seeds, "weights": None if weights is None else str(weights), "input_range": input_range,
        "partial": partial or None, "trust": tuple(trust_custom_objects) if trust_custom_objects else None,
    }  # fmt: skip
    if dry_run:
        from tfxfer.workflow.inspecting import dry_run as look
        from tfxfer.workflow.planning import make_plan

        found = look(data, make_plan(config, **options))
        print_json(found) if json else print_freezing(found)
        return
    more: dict[str, Any] = {"resume": resume}
    if checkpoint_every:
        more["checkpoint_seconds"] = parse_seconds(checkpoint_every)
    if resume and config is None and out is not None:
        config = begun_config(out)
    run_training(data, config, options, out=out, split=split, print_config=print_config, as_json=json, **more)


def run_training(
    data: Path,
    config: Path | None,
    options: dict[str, Any],
    *,
    out,
    split=None,
    print_config=False,
    as_json=False,
    **more: Any,
) -> dict[str, Any]:
    """Train and show the result; a negative verdict ends with exit status 1."""
    from tfxfer.workflow.planning import make_plan

    plan = make_plan(config, **options)
    if print_config:
        import tomli_w

        print(tomli_w.dumps(plan.to_dict()), end="")
        raise typer.Exit(0)
    with Live() as progress:
        from tfxfer.workflow.start import train_early

        run = train_early(data, plan, out=out, split=split, progress=progress, **more)
    if as_json:
        print_json(run.info)
    else:
        print_run(run.info, run.path)
    if run.info["baseline"]["verdict"] == "negative":
        raise typer.Exit(1)
    return run.info


def begun_config(out: Path) -> Path:
    """The plan of a run that is to be gone on with."""
    config = out / "config.toml"
    if not config.is_file():
        raise InputError(f"{out} is no run that was begun: it has no config.toml; drop --resume to train anew.")
    return config


def parse_seconds(text: str | None) -> float | None:
    """Seconds of `90`, `90s`, `5m` or `1.5h`.

    Example:
        >>> parse_seconds("5m")
        300.0
    """
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{text!r} is not a time; write seconds, or 5m, or 1h.")
    return seconds

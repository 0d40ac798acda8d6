"""`tfxfer train DATA`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tfxfer.cli.show import Live, print_freezing, print_json, print_run, quiet_libraries
from tfxfer.errors import InputError
from tfxfer.runtime.cluster import cluster_for
from tfxfer.runtime.process import end_after_sigterm
from tfxfer.runtime.progress import Lines

NAME = "train"
HELP = "Fine-tune a pretrained source on labelled images; score, export, verify and judge the result."

END_SECONDS = 9.0

Option = typer.Option


def run(
    data: Annotated[
        Path, typer.Argument(help="Folder of class folders (or of train/ test/ val/ that hold those), or a .csv.")
    ],
    source: Annotated[
        str | None,
        Option(
            help="Name of the pretrained source (see `tfxfer sources`), or hub:PATH, keras:NAME, FILE.h5 ...; run:OLD "
            "goes on with an earlier run."
        ),
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
    drop_class: Annotated[
        list[str] | None, Option(help="Class of the run that --source run:OLD continues that is to go.")
    ] = None,
    recipe: Annotated[
        str | None, Option(help="auto, probe, full, gradual, affine or bit; or FILE.toml with stages of your own.")
    ] = None,
    method: Annotated[str | None, Option(help="fine_tune, or probe (frozen features only).")] = None,
    probe: Annotated[
        str | None, Option(help="The head on frozen features: convex (logistic regression), ridge, or prototype.")
    ] = None,
    features: Annotated[
        str | None,
        Option(help="What that head reads: last (block), multi (several blocks, pooled) or auto (measured)."),
    ] = None,
    precision: Annotated[
        str | None, Option(help="What fine-tuning computes in: auto (measured), float32, bfloat16 or (GPU) float16.")
    ] = None,
    freeze: Annotated[
        str | None,
        Option(help="Frozen: leading blocks by number, share (0.7), name or all; or re:PATTERN, any layers."),
    ] = None,
    image_size: Annotated[int | None, Option(help="Side in pixels that images are resized to.")] = None,
    epochs: Annotated[int | None, Option(help="Epochs of fine-tuning.")] = None,
    batch_size: Annotated[int | None, Option(help="Images a step.")] = None,
    lr: Annotated[
        str | None,
        Option(help="Peak learning rate, or find (a range test); by default the best of three, measured."),
    ] = None,
    batch_norm: Annotated[str | None, Option(help="frozen, affine, adapt or train.")] = None,
    augment: Annotated[str | None, Option(help="auto, mirror, rand (RandAugment) or none.")] = None,
    views: Annotated[
        int | None, Option(help="With --augment rand: views of each image computed once, the plain one counted.")
    ] = None,
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
        str | None, Option(help="Seconds, or 5m or 1h, for the whole command: training is planned to fit.")
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
    strategy: Annotated[
        str, Option(help="auto, none, mirrored (all GPUs) or multi_worker (the machines of TF_CONFIG).")
    ] = "auto",
    json: Annotated[bool, Option("--json", help="Print run.json on stdout instead of a table.")] = False,
) -> None:
    quiet_libraries()
    if no_baseline and baseline:
        raise InputError("--baseline and --no-baseline were given both; drop one.")
    options: dict[str, Any] = {
        "source": source, "recipe": recipe, "method": method, "probe": probe, "features": features, "precision":
        precision, "freeze_depth": freeze, "image_size": image_size, "epochs": epochs, "batch_size": batch_size,
        "learning_rate": lr, "batch_norm": batch_norm, "augment": augment, "views": views,
        "dropout": dropout, "seed": seed, "val_fraction": val_fraction,
        "group_by": group_by, "near_duplicates": near_duplicates, "metric": metric,
        "time_limit_seconds": parse_seconds(time_limit),
        "baseline": "none" if no_baseline else baseline, "num_seeds": seeds, "weights": None if weights is None else
        str(weights), "input_range": input_range, "partial": partial or None, "trust": tuple(trust_custom_objects) if
        trust_custom_objects else None,
        "drop_class": tuple(drop_class) if drop_class else None,
    }  # fmt: skip
    if dry_run:
        from tfxfer.workflow.inspecting import dry_run as look
        from tfxfer.workflow.planning import make_plan

        found = look(data, make_plan(config, data=data, **options))
        print_json(found) if json else print_freezing(found)
        return
    more: dict[str, Any] = {"resume": resume, "split": split}
    if checkpoint_every:
        more["checkpoint_seconds"] = parse_seconds(checkpoint_every)
    run_training(data, config, options, out=out, print_config=print_config, as_json=json, strategy=strategy, **more)


def run_training(
    data: Path,
    config: Path | None,
    options: dict[str, Any],
    *,
    out,
    print_config=False,
    as_json=False,
    strategy: str = "none",
    **more: Any,
) -> dict[str, Any]:
    """Train and show the result; a negative verdict ends with exit status 1."""
    cluster = None if print_config else cluster_for(strategy)

    def here(devices: Any = strategy) -> Any:
        return _trained(data, config, options, out, print_config, strategy=devices, **more)

    run = here() if cluster is None else _together(strategy, here)
    if cluster is not None and not cluster.is_chief:
        print(f"tfxfer: done; worker 0 at {cluster.addresses[0]} wrote {run.path}.", file=sys.stderr)
    elif as_json:
        print_json(run.info)
    else:
        print_run(run.info, run.path)
    if run.info["baseline"]["verdict"] == "negative":
        raise typer.Exit(1)
    return run.info


def _together(strategy: str, work: Callable[[Any], Any]) -> Any:
    from tfxfer.workflow.start import decide_always_alike
    from tfxfer.workflow.together import together

    decide_always_alike()
    return together(strategy, work, Lines())


def _trained(data: Path, config: Path | None, options: dict[str, Any], out, print_config: bool, **more: Any) -> Any:
    from tfxfer.workflow.planning import make_plan

    if more.get("resume") and config is None and out is not None:
        from tfxfer.workflow.run import begun_config

        config = begun_config(out)
    plan = make_plan(config, data=data, **options)
    if print_config:
        import tomli_w

        print(tomli_w.dumps(plan.to_dict()), end="")
        raise typer.Exit(0)
    told = "tfxfer: Told to end by SIGTERM; go on with --resume from what was saved before."
    with end_after_sigterm(END_SECONDS, told), Live() as progress:
        from tfxfer.workflow.start import train_early

        return train_early(data, plan, out=out, progress=progress, **more)


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
        raise InputError(f"{text!r} is not a time above zero; write seconds, or 5m, or 1h.")
    return seconds

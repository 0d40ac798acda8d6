"""Look without training: what a source is made of, and what a plan would freeze."""

import dataclasses
from pathlib import Path
from typing import Any

from tfxfer.data.load import look_over
from tfxfer.specs import Plan, Source, depth_of
from tfxfer.train.freezing import auto_depth
from tfxfer.workflow.continuing import look_ahead
from tfxfer.workflow.planning import source_of


def describe_source(card: Source) -> dict[str, Any]:
    """The card, and the blocks of the network with their numbers of parameters; imports TensorFlow.

    Returns:
        The card's fields, and `blocks`: name, num_layers, num_parameters each, `num_parameters`, `features`,
        `fine_tune_depth` as a number of blocks; where the weights lie in a file, `load_report`: what of it fits, and
        `text` that tells it.

    Raises:
        InputError: Where the file does not fit.
    """
    from tfxfer.model.blocks import list_blocks

    backbone, report = _looked_at(card, None)
    blocks = [
        {"name": block.name, "num_layers": len(block.layers), "num_parameters": block.num_parameters}
        for block in list_blocks(backbone)
    ]
    total = backbone.count_params()
    depth = depth_of([str(block["name"]) for block in blocks], auto_depth(card))
    facts = {"features": int(backbone.output_shape[-1]), "num_parameters": total, "blocks": blocks}
    return {**card.to_dict(), "fine_tune_depth": depth, **facts, **report}


def _in_a_file(card: Source) -> bool:
    return "file" in card.weights and "package" not in card.weights


def _looked_at(card: Source, image_size: int | None) -> tuple[Any, dict[str, Any]]:
    """The network; with its weights only where they are a file, of which it is not known yet whether it fits."""
    from tfxfer.sources.catalog import load_with_report

    backbone, report = load_with_report(card, image_size=image_size, weights=_in_a_file(card))
    return backbone, {} if report is None else {"load_report": {**report.to_dict(), "text": str(report)}}


def dry_run(data: Path, plan: Plan) -> dict[str, Any]:
    """What a plan would freeze, without reading an image; weights are loaded only where they are a file.

    Returns:
        `source`, `class_names`, `load_report` as `describe_source`, and `stages`: name, freeze depth, batch_norm,
        num_parameters, num_trainable, and `layers`: layer, block, num_parameters, num_trainable each. Where a run is
        continued also `continued`: which classes and how many images are kept, new, dropped.
    """
    names = look_over(data)
    continued = look_ahead(data, names, plan)
    from tfxfer.model.build import assemble
    from tfxfer.model.freeze import freeze, list_layers

    card = source_of(plan)
    backbone, report = _looked_at(card, plan.image_size)
    model = assemble(backbone, card, list(names), dropout=plan.dropout)
    stages = []
    for stage in plan.recipe.stages:
        if plan.method == "probe" and not stage.is_probe:
            continue
        depth = "all" if stage.is_probe else stage.freeze_depth
        depth = auto_depth(card) if depth == "auto" else depth
        batch_norm = "frozen" if stage.batch_norm == "auto" else stage.batch_norm
        layers = list_layers(freeze(model, depth, batch_norm=batch_norm))
        stages.append(
            {
                "name": stage.name,
                "freeze_depth": depth,
                "batch_norm": batch_norm,
                "num_parameters": sum(layer.num_parameters for layer in layers),
                "num_trainable": sum(layer.num_trainable for layer in layers),
                "layers": [dataclasses.asdict(layer) for layer in layers],
            }
        )
    if continued:
        kinds = continued["continued"]["classes"]
        names = (*kinds["kept"], *kinds["new"])
    return {"source": plan.source, "class_names": list(names), "stages": stages, **report, **continued}

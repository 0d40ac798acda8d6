"""Look without training: what a source is made of, and what a plan would freeze."""

import dataclasses
from pathlib import Path
from typing import Any

from tfxfer.data.load import look_over
from tfxfer.specs import Plan, Source
from tfxfer.workflow.planning import auto_depth, source_of


def describe_source(card: Source) -> dict[str, Any]:
    """The card, and the blocks of the network with their numbers of parameters; imports TensorFlow.

    Returns:
        The card's fields, and `blocks`: name, num_layers, num_parameters each, `num_parameters`, `features`.
    """
    from tfxfer.model.blocks import list_blocks
    from tfxfer.sources.catalog import load_backbone

    backbone = load_backbone(card, weights=False)
    blocks = [
        {"name": block.name, "num_layers": len(block.layers), "num_parameters": block.num_parameters}
        for block in list_blocks(backbone)
    ]
    total = backbone.count_params()
    return {**card.to_dict(), "features": int(backbone.output_shape[-1]), "num_parameters": total, "blocks": blocks}


def dry_run(data: Path, plan: Plan) -> dict[str, Any]:
    """What a plan would freeze, without reading an image or loading weights.

    Returns:
        `source`, `class_names`, and `stages`: name, freeze depth, batch_norm, num_parameters, num_trainable, and
        `layers`: layer, block, num_parameters, num_trainable each.
    """
    names = look_over(data)
    from tfxfer.model.build import assemble
    from tfxfer.model.freeze import freeze, list_layers
    from tfxfer.sources.catalog import load_backbone

    card = source_of(plan)
    backbone = load_backbone(card, image_size=plan.image_size, weights=False)
    model = assemble(backbone, card, list(names), dropout=plan.dropout)
    stages = []
    for stage in plan.recipe.stages:
        if plan.method == "probe" and stage.solver != "convex":
            continue
        depth = "all" if stage.solver == "convex" else stage.freeze_depth
        depth = auto_depth(card) if depth == "auto" else depth
        layers = list_layers(freeze(model, depth, batch_norm=stage.batch_norm))
        stages.append(
            {
                "name": stage.name,
                "freeze_depth": depth,
                "batch_norm": stage.batch_norm,
                "num_parameters": sum(layer.num_parameters for layer in layers),
                "num_trainable": sum(layer.num_trainable for layer in layers),
                "layers": [dataclasses.asdict(layer) for layer in layers],
            }
        )
    return {"source": plan.source, "class_names": list(names), "stages": stages}

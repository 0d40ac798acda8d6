"""tfxfer: transfer learning for Keras and TensorFlow, measured, audited and verified.

Public names are imported when they are first used, so that `import tfxfer` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Block": "tfxfer.specs",
    "Certificate": "tfxfer.specs",
    "CheckError": "tfxfer.errors",
    "Classes": "tfxfer.model.head",
    "Dataset": "tfxfer.data",
    "InputError": "tfxfer.errors",
    "Interrupted": "tfxfer.errors",
    "Plan": "tfxfer.specs",
    "Progress": "tfxfer.runtime.progress",
    "Recipe": "tfxfer.specs",
    "Run": "tfxfer.workflow.run",
    "SeenImagesWarning": "tfxfer.workflow.scoring",
    "Source": "tfxfer.specs",
    "SplitMismatchWarning": "tfxfer.metrics",
    "Stage": "tfxfer.specs",
    "TfxferError": "tfxfer.errors",
    "TransferHyperModel": "tfxfer.tuning.hypermodel",
    "adapt_batch_norm": "tfxfer.model.freeze",
    "audit_frozen": "tfxfer.model.freeze",
    "build_model": "tfxfer.model.build",
    "digest_frozen": "tfxfer.model.freeze",
    "evaluate": "tfxfer.workflow.scoring",
    "export": "tfxfer.workflow.api",
    "fit": "tfxfer.workflow.api",
    "freeze": "tfxfer.model.freeze",
    "get_recipe": "tfxfer.train.recipes",
    "get_source": "tfxfer.sources.catalog",
    "keep_source_classes": "tfxfer.model.source_classes",
    "list_blocks": "tfxfer.model.blocks",
    "list_layers": "tfxfer.model.freeze",
    "list_sources": "tfxfer.sources.catalog",
    "load_backbone": "tfxfer.sources.catalog",
    "load_data": "tfxfer.data",
    "load_matching_weights": "tfxfer.sources.legacy_h5",
    "load_run": "tfxfer.workflow.run",
    "predict": "tfxfer.workflow.scoring",
    "predict_with_source": "tfxfer.workflow.scoring",
    "search": "tfxfer.workflow.search",
    "unfreeze": "tfxfer.model.freeze",
    "verify": "tfxfer.workflow.scoring",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tfxfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

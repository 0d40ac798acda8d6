"""The words of tfxfer as frozen dataclasses: Source, Stage, Recipe, Plan, Block, Certificate. Plain data only."""

from tfxfer.specs.base import Spec, read_toml
from tfxfer.specs.certificate import Certificate
from tfxfer.specs.depth import depth_of, pattern_of
from tfxfer.specs.plan import METRICS, Plan
from tfxfer.specs.recipe import BATCH_NORM_STATES, PARAMETERS, PROBE_SOLVERS, Recipe, Stage
from tfxfer.specs.source import Block, Source

__all__ = [
    "BATCH_NORM_STATES",
    "METRICS",
    "PARAMETERS",
    "PROBE_SOLVERS",
    "Block",
    "Certificate",
    "Plan",
    "Recipe",
    "Source",
    "Spec",
    "Stage",
    "depth_of",
    "pattern_of",
    "read_toml",
]

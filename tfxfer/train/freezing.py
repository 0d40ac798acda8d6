"""What the fine-tuning stages of a recipe freeze together, and the statistics that they estimate anew."""

from collections.abc import Sequence

import keras
import numpy as np

from tfxfer.features.cut import Cut, cut_model
from tfxfer.features.extract import Extracted
from tfxfer.model.blocks import list_blocks
from tfxfer.model.freeze import Depth, adapt_batch_norm, freeze, leading_blocks
from tfxfer.specs import Source, Stage

AUTO_SHARE = 0.7  # of the blocks of a source that has no card to say how many to freeze


def auto_depth(card: Source) -> int | float:
    """What freeze depth "auto" means for a source."""
    return card.fine_tune_depth if card.fine_tune_depth >= 0 else AUTO_SHARE


class Freezing:
    """The stages' depths and states of BatchNorm.

    Args:
        model: Of `build_model`.
        stages: That train step by step, none where there is a probe alone.
        auto_depth: What freeze depth "auto" means here.

    Attributes:
        depths: What each stage freezes, as `freeze` takes it.
        num_leading: Leading blocks that all of them freeze.
        batch_norm: The state in all of them; "train", which lets the most move, where they differ.
        adapting: What the stages freeze that want statistics estimated anew.
    """

    def __init__(self, model: keras.Model, stages: Sequence[Stage], auto_depth: Depth):
        self.model, self._stages, self._num_blocks = model, stages, len(list_blocks(model))
        self.depths: list[Depth] = [auto_depth if s.freeze_depth == "auto" else s.freeze_depth for s in stages]
        self.num_leading = min((leading_blocks(model, depth) for depth in self.depths), default=self._num_blocks)
        states = {stage.batch_norm for stage in stages}
        self.batch_norm = states.pop() if len(states) == 1 else "train" if states else "frozen"
        self.adapting = [depth for stage, depth in zip(stages, self.depths, strict=True) if stage.batch_norm == "adapt"]

    def set(self) -> None:
        """Freeze in the model what all stages freeze."""
        narrow = all(stage.parameters == "affine" for stage in self._stages) and bool(self._stages)
        parameters = "affine" if narrow else "all"
        freeze(self.model, self._kept(self.depths), batch_norm=self.batch_norm, parameters=parameters)

    def cut(self) -> Cut:
        """Set it, and cut at the shallowest stage, or shallower still where it cannot be cut there."""
        self.set()
        for depth in range(self.num_leading, -1, -1):
            cut = cut_model(self.model, depth)
            if cut is not None:
                return cut
        raise AssertionError("a cut before the first block crosses the input alone")

    def adapt(self, cut: Cut, extracted: Extracted, rows: np.ndarray) -> None:
        """Estimate the statistics anew, once, in the blocks of the stages that ask for it; all stages begin with these.

        Args:
            cut: Of `cut`.
            extracted: What crosses it.
            rows: Numbers of the images that they are estimated on, in the plain view.
        """
        freeze(self.model, self._kept(self.adapting), batch_norm="adapt")
        adapt_batch_norm(cut.suffix, _PlainRows(extracted, rows))
        self.set()

    def _kept(self, depths: Sequence[Depth]) -> Depth:
        """Of several stages only the leading blocks that all of them freeze are sure to stay."""
        if len(depths) == 1:
            return depths[0]
        return min((leading_blocks(self.model, depth) for depth in depths), default=self._num_blocks)


class _PlainRows:
    """Activations of some images in the plain view, read batch by batch."""

    def __init__(self, extracted: Extracted, rows: np.ndarray):
        self._activations, self._rows = extracted.activations, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, picked: slice):
        return self._activations[0, self._rows[picked]]

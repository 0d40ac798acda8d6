"""How long a stage trains: its epochs, and those that small data or a length in steps make of them."""

import math

from tfxfer.specs import Stage

MIN_STEPS = 100


def epochs_of(stage: Stage, num_images: int, batch_size: int) -> int:
    """Epochs of a run of a stage.

    Args:
        stage: With `min_steps` it has at least `MIN_STEPS` steps: six epochs of a hundred images would be 24, too few
            to move anything.
        num_images: Trained on.
        batch_size: Images a step.

    Example:
        >>> epochs_of(Stage("tune", epochs=6), 100, 32), epochs_of(Stage("tune", epochs=6, min_steps=False), 100, 32)
        (25, 6)
        >>> epochs_of(Stage("tune", steps=10, reference_batch_size=64), 100, 32)
        5
    """
    steps = -(-num_images // batch_size)
    if stage.steps:
        return math.ceil(stage.steps / scale_of(stage, batch_size) / steps)
    return max(stage.epochs, -(-MIN_STEPS // steps)) if stage.min_steps else stage.epochs


def scale_of(stage: Stage, batch_size: int) -> float:
    """This batch size by the one that a stage's rates and steps are meant for."""
    return batch_size / stage.reference_batch_size if stage.reference_batch_size else 1.0

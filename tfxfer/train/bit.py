"""BiT-HyperRule: the length of a fine-tuning, mixup and the resolution by the data alone, so that nothing is searched.

Kept of the paper: SGD with momentum 0.9 at 0.003 for 512 images, warm-up and a tenth of the rate at the points of
their code; 500, 10 000 or 20 000 steps by the number of images; mixup 0.1 from 20 000 images on; 128 pixels for images
smaller than 96 x 96, else 384; mirrored images; no weight decay, no label smoothing. Other batch sizes see as many
images, at a rate in proportion, as in their notebooks. Not kept: random crops of images that were resized to 160 or
448 pixels; the head begins at the optimum on frozen features, not at zero; the sources here have BatchNorm, which
trains along, not GroupNorm with weight standardisation; images are held out and may say that the head alone is better.

Reference:
    Kolesnikov, Beyer, Zhai, Puigcerver, Yung, Gelly, Houlsby. Big Transfer (BiT): General Visual Representation
    Learning. ECCV 2020.
"""

import dataclasses

from tfxfer.specs import Stage

SMALL, LARGE = 20_000, 500_000  # images
MIXUP = 0.1
SMALL_AREA_PX = 96 * 96
# Warm-up, three decays and the end, in steps of 512 images.
SCHEDULES = (
    (SMALL, (100, 200, 300, 400, 500)),
    (LARGE, (500, 3000, 6000, 9000, 10_000)),
    (None, (500, 6000, 12_000, 18_000, 20_000)),
)


def bit_stage(stage: Stage, num_images: int) -> Stage:
    """A stage with the length and the mixup for so many images; one that counts epochs keeps its length.

    Example:
        >>> found = bit_stage(Stage("bit", schedule="steps", steps=500), 30_000)
        >>> found.steps, found.warmup_share, found.decay_at, found.mixup
        (10000, 0.05, (0.3, 0.6, 0.9), 0.1)
        >>> bit_stage(Stage("bit", schedule="steps", steps=500), 200).decay_at
        (0.4, 0.6, 0.8)
    """
    warmup, *decays, steps = next(points for limit, points in SCHEDULES if limit is None or num_images < limit)
    return dataclasses.replace(
        stage,
        warmup_share=warmup / steps,
        decay_at=tuple(point / steps for point in decays),
        steps=steps if stage.steps else 0,
        mixup=stage.mixup or (0.0 if num_images < SMALL else MIXUP),
    )


def bit_image_size(area_px: float) -> int:
    """The side in pixels for images of such an area.

    Example:
        >>> bit_image_size(32 * 32), bit_image_size(640 * 480)
        (128, 384)
    """
    return 128 if area_px < SMALL_AREA_PX else 384

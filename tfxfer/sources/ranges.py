"""What a network wants pixels scaled to, by name."""

from tfxfer.errors import InputError, did_you_mean

# name: scale and offset by channel, `pixel * scale + offset` with pixels in 0..255, and the order of channels.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANGES: dict[str, tuple[tuple[float, ...], tuple[float, ...], str]] = {
    "0..255": ((1.0,) * 3, (0.0,) * 3, "rgb"),
    "0..1": ((1 / 255,) * 3, (0.0,) * 3, "rgb"),
    "-1..1": ((1 / 127.5,) * 3, (-1.0,) * 3, "rgb"),
    "imagenet": (
        tuple(1 / (255 * std) for std in _STD),
        tuple(-mean / std for mean, std in zip(_MEAN, _STD, strict=True)),
        "rgb",
    ),
    "caffe": ((1.0,) * 3, (-103.939, -116.779, -123.68), "bgr"),
}


def range_facts(name: str) -> dict:
    """`scale`, `offset` and `channel_order` of a card for a named range.

    Args:
        name: "0..255" (as they are), "0..1", "-1..1", "imagenet" (mean and standard deviation of ImageNet, as in
            torchvision) or "caffe" (BGR less ImageNet's mean, as the first Keras networks were trained).

    Raises:
        InputError: Where there is no such range.

    Example:
        >>> range_facts("-1..1")["offset"]
        (-1.0, -1.0, -1.0)
    """
    if name not in RANGES:
        raise InputError(f"Unknown input range {name!r}. {did_you_mean(name, RANGES)} There are {', '.join(RANGES)}.")
    scale, offset, order = RANGES[name]
    return {"scale": scale, "offset": offset, "channel_order": order}

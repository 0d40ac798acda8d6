"""Range tests of learning rates on disk: the numbers as a CSV, the curves as a PNG."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tfxfer.runtime.files import atomic_path, write_text
from tfxfer.train.rates import RateTest

CSV_FILE, PLOT_FILE = "lr_find.csv", "lr_find.png"
WIDTH_PX, HEIGHT_PX, MARGIN_PX = 900, 480, 70
GREY, BLUE, RED, GREEN, BLACK = "#b8b8b8", "#1f5fa8", "#b3261e", "#2e7d32", "#202020"


def write_rate_tests(folder: Path, tests: Sequence[RateTest]) -> None:
    """Write `lr_find.csv`, a row a step, and `lr_find.png`, a curve a stage, into a run's folder."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["stage", "step", "learning_rate", "loss", "start_loss", "smoothed_loss"])
    for test in tests:
        for step, row in enumerate(zip(test.rates, test.losses, test.start_losses, test.smoothed, strict=True)):
            writer.writerow([test.stage, step, *(f"{value:.6g}" for value in row)])
    write_text(folder / CSV_FILE, text.getvalue())
    picture = Image.new("RGB", (WIDTH_PX, HEIGHT_PX * len(tests)), "white")
    for number, test in enumerate(tests):
        picture.paste(draw_rate_test(test), (0, HEIGHT_PX * number))
    with atomic_path(folder / PLOT_FILE) as temporary:
        picture.save(temporary, format="PNG")


def draw_rate_test(test: RateTest) -> Image.Image:
    """The loss over the logarithm of the rate: each batch in grey, smoothed in blue, the suggestions as lines."""
    picture = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=15)
    smoothed = test.smoothed
    low, high = float(smoothed.min()), float(max(smoothed[0], np.quantile(smoothed, 0.9)))
    low, high = low - 0.1 * max(high - low, 1e-3), high + 0.2 * max(high - low, 1e-3)
    first, last = np.log10(test.rates[0]), max(np.log10(test.rates[-1]), np.log10(test.rates[0]) + 1)
    right, bottom = WIDTH_PX - MARGIN_PX // 2, HEIGHT_PX - MARGIN_PX

    def place(rate: float, loss: float) -> tuple[float, float]:
        x = MARGIN_PX + (np.log10(rate) - first) / (last - first) * (right - MARGIN_PX)
        y = bottom - (np.clip(loss, low, high) - low) / (high - low) * (bottom - MARGIN_PX // 2)
        return float(x), float(y)

    for power in range(int(np.ceil(first)), int(np.floor(last)) + 1):
        x, _ = place(10.0**power, low)
        draw.line([(x, bottom), (x, bottom + 5)], fill=BLACK)
        draw.text((x, bottom + 8), f"1e{power}", fill=BLACK, font=font, anchor="ma")
    for loss in np.linspace(low, high, 5):
        _, y = place(test.rates[0], loss)
        draw.line([(MARGIN_PX - 5, y), (MARGIN_PX, y)], fill=BLACK)
        draw.text((MARGIN_PX - 9, y), f"{loss:.3g}", fill=BLACK, font=font, anchor="rm")
    draw.rectangle([MARGIN_PX, MARGIN_PX // 2, right, bottom], outline=BLACK)
    for losses, colour, width in ((test.losses, GREY, 1), (smoothed, BLUE, 3)):
        points = [place(rate, loss) for rate, loss in zip(test.rates, losses, strict=True)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=width)
    for row, (name, colour) in enumerate((("steepest", RED), ("minimum_tenth", GREEN))):
        rate = test.suggestions.get(name)
        if rate is None:
            continue
        x, _ = place(max(rate, test.rates[0]), low)
        draw.line([(x, MARGIN_PX // 2), (x, bottom)], fill=colour, width=2)
        draw.text((x + 6, MARGIN_PX // 2 + 6 + 20 * row), f"{name} {rate:.2g}", fill=colour, font=font)
    draw.text((WIDTH_PX // 2, 8), f"{test.stage}: loss over learning rate", fill=BLACK, font=font, anchor="ma")
    return picture

"""The decoder against Pillow's own steps and hand-made pixels, on well-formed and hostile files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tfxfer.runtime import images
from tfxfer.runtime.images import (
    ImageError,
    decode_image,
    decode_images,
    hamming_distances,
    perceptual_hash,
    resize_image,
)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
    return small.resize((400, 300), Image.Resampling.BICUBIC)


def test_keeps_pixels_of_lossless_formats(photo):
    for kind in ("png", "bmp", "tiff", "ppm"):
        assert np.array_equal(decode_image(encoded(photo, kind)), np.asarray(photo)), kind


def test_resize_is_pillow_bilinear_on_the_whole_picture(photo):
    expected = np.asarray(photo.resize((96, 96), Image.Resampling.BILINEAR))
    assert np.array_equal(decode_image(encoded(photo, "png"), 96), expected)
    assert np.array_equal(resize_image(np.asarray(photo), 96), expected)


def test_resize_equals_antialiased_triangle_filter_computed_by_hand():
    row = np.array([[0, 100, 200, 60]], np.uint8)
    # Halving: the triangle around x=1 reaches over pixels centred at 0.5, 1.5, 2.5 with weights 3, 3, 1 of 7.
    left = (3 * 0 + 3 * 100 + 1 * 200) / 7
    right = (1 * 100 + 3 * 200 + 3 * 60) / 7
    assert np.abs(resize_image(row.repeat(2, 0)[..., None], 2)[0, :, 0] - [left, right]).max() <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(photo, orientation):
    array = np.asarray(photo)
    turned = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: np.rot90(array, 2).transpose(1, 0, 2),
        8: np.rot90(array, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode_image(encoded(photo, "png", exif=exif)), turned)


def test_broken_exif_does_not_lose_the_picture(photo):
    content = encoded(photo, "jpeg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01\x12")
    assert decode_image(content).shape == (300, 400, 3)


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert decode_image(encoded(Image.fromarray(values), "png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    pgm = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    assert decode_image(pgm)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_alpha_is_laid_over_white():
    rgba = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8))
    assert decode_image(encoded(rgba, "png"))[0].tolist() == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8))
    assert decode_image(encoded(grey, "png"))[0].tolist() == [[10, 10, 10], [255, 255, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putdata([0, 1])
    assert decode_image(encoded(palette, "png", transparency=1))[0].tolist() == [[9, 8, 7], [255, 255, 255]]


def test_other_pixel_types():
    grey = Image.fromarray(np.array([[7, 250]], np.uint8))
    assert decode_image(encoded(grey, "png"))[0].tolist() == [[7] * 3, [250] * 3]
    assert decode_image(encoded(grey.convert("1", dither=Image.Dither.NONE), "png"))[0, :, 0].tolist() == [0, 255]
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(decode_image(encoded(cmyk, "jpeg", quality=95)).astype(int) - [0, 255, 255]).max() <= 4
    with pytest.raises(ImageError, match="32-bit numbers"):
        decode_image(encoded(Image.fromarray(np.array([[0.5]], np.float32)), "tiff"))


def test_first_frame_and_content_decide(tmp_path, photo):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    (tmp_path / "gif.jpg").write_bytes(encoded(frames[0], "gif", save_all=True, append_images=frames[1:]))
    assert decode_image(tmp_path / "gif.jpg")[0, 0].tolist() == [255, 0, 0]
    (tmp_path / "png.jpg").write_bytes(encoded(photo, "png"))
    assert np.array_equal(decode_image(tmp_path / "png.jpg"), np.asarray(photo))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 100, "only zero bytes"),
        (b"path,label\na.jpg,cat\n", "text, not an image"),
        (bytes(range(256)), "not an image of a known format"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "HEIC"),
        (bomb(20000, 20000), "megapixels"),
        (bomb(10001, 10000), "megapixels"),
        (bomb(64, 64), "truncated|broken"),
        (b"\x89PNG\r\n\x1a\n", "not an image|broken"),
        (b"\xff\xd8\xff\xe0", "truncated|not an image|broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text"),
    ],
)
def test_refuses_what_is_no_image(tmp_path, content, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(content)
    assert caught.value.exit_status == 2
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        decode_image(path, 32)
    assert str(path) in str(caught.value) and str(path) not in caught.value.reason


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "bmp", "webp", "tiff"])
def test_truncated_files_are_refused(photo, kind):
    content = encoded(photo, kind)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError):
            decode_image(content[: int(len(content) * share)])


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        decode_image(tmp_path / "nothing.jpg")


@pytest.mark.parametrize("size", [(1600, 1200), (500, 1600)])
def test_a_large_jpeg_is_decoded_whole_and_shrunk_along_the_width_first(photo, size):
    large = encoded(photo.resize(size, Image.Resampling.BICUBIC), "jpeg", quality=90)
    wide = Image.open(io.BytesIO(large)).resize((96, size[1]), Image.Resampling.BILINEAR)
    assert np.array_equal(decode_image(large, 96), np.asarray(wide.resize((96, 96), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("workers", [1, 3])
def test_many_images_keep_their_order(tmp_path, workers):
    paths = []
    for value in range(100):
        path = tmp_path / f"{value}.png"
        Image.new("L", (5 + value % 3, 4), value).save(path)
        paths.append(path)
    seen = []
    pixels = decode_images(paths, 6, workers=workers, on_progress=lambda done, total: seen.append((done, total)))
    assert pixels.shape == (100, 6, 6, 3)
    assert np.array_equal(pixels[:, 2, 2, 1], np.arange(100))
    assert seen == [(done, 100) for done in range(1, 101)]


def test_results_of_threads_come_in_order_and_lazily():
    asked = []

    def numbers():
        for number in range(500):
            asked.append(number)
            yield number

    results = images.map_threads(lambda number: number**2, numbers(), 3)
    assert next(results) == 0 and len(asked) < 100
    assert list(results) == [number**2 for number in range(1, 500)]


def test_first_unreadable_of_many_is_named(tmp_path):
    good = tmp_path / "good.png"
    Image.new("RGB", (4, 4)).save(good)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    with pytest.raises(ImageError, match=r"bad\.png cannot be read: the file is empty"):
        decode_images([good, bad, good], 4)


def test_large_pixel_stores_live_in_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "_MEMORY_LIMIT_BYTES", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), (1, 2, 3)).save(path)
    pixels = decode_images([path] * 30, 8)
    assert isinstance(pixels, np.memmap) and (pixels == [1, 2, 3]).all()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]  # nothing is left behind


def test_perceptual_hash_tells_pictures_apart(photo):
    same = [
        photo.resize((200, 150)),
        Image.open(io.BytesIO(encoded(photo, "jpeg", quality=40))),
        photo.point(lambda value: min(255, value * 1.1)),
    ]
    own = perceptual_hash(photo)
    assert 0 < own < 2**64
    assert all(hamming_distances(own, perceptual_hash(picture)) <= 6 for picture in same)
    assert perceptual_hash(np.asarray(photo)) == own
    assert hamming_distances(own, perceptual_hash(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 16


def test_perceptual_hash_against_scipy(photo):
    scipy_fft = pytest.importorskip("scipy.fft")
    look = images.small_look(photo).astype(float) @ [0.299, 0.587, 0.114]
    low = scipy_fft.dctn(look, type=2)[:8, :8].reshape(-1)
    bits = low > np.median(low[1:])
    bits[0] = False
    expected = sum(1 << int(place) for place in np.flatnonzero(bits))
    assert hamming_distances(expected, perceptual_hash(photo)) <= 1  # one may sit on the median


def test_hamming_distances_broadcast():
    a = np.array([0, 2**64 - 1], np.uint64)
    assert hamming_distances(a[:, None], a[None, :]).tolist() == [[0, 64], [64, 0]]

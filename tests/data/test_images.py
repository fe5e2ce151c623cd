"""Images: orientation once, no clipping, and every damaged file is a one-line error that names the record."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from finetune.data.images import image_size_hw, load_image
from finetune.errors import DataFormatError
from finetune.schema import ImageInput


def encode(image: Image.Image, format: str, **options: object) -> ImageInput:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return ImageInput(data=buffer.getvalue())


def marked() -> Image.Image:
    """6 wide, 4 high, top-left pixel red, top-right blue."""
    pixels = np.full((4, 6, 3), 90, np.uint8)
    pixels[0, 0] = 255, 0, 0
    pixels[0, -1] = 0, 0, 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "red_at"),
    [(1, (0, 0)), (2, (0, 5)), (3, (3, 5)), (4, (3, 0)), (5, (0, 0)), (6, (0, 3)), (7, (5, 3)), (8, (5, 0))],
)
def test_exif_orientation_is_applied_exactly_once(format: str, orientation: int, red_at: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encode(marked(), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    loaded = load_image(image)
    assert tuple(np.asarray(loaded)[red_at]) == (255, 0, 0)
    assert image_size_hw(image) == (loaded.height, loaded.width) == ((6, 4) if orientation >= 5 else (4, 6))
    assert not loaded.getexif()  # a second reader finds nothing left to apply


def test_jpeg_orientation_and_damaged_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encode(marked().resize((60, 40), 0), "JPEG", exif=exif)
    assert image_size_hw(image) == (60, 40)
    assert load_image(image).size == (40, 60)
    image = encode(marked(), "JPEG", exif=b"Exif\0\0garbage")
    assert (image_size_hw(image), load_image(image).size) == ((4, 6), (6, 4))


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA", "CMYK", "1", "RGB"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_a_turned_tiff_file_reads_as_its_bytes_do(tmp_path: Path, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.random.default_rng(0).integers(0, 2, (4, 6), np.uint8) * 255
    picture = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.fromarray(values).convert(mode)
    picture.save(tmp_path / "a.tif", exif=exif)
    from_path = load_image(ImageInput(path=str(tmp_path / "a.tif")))
    upright = load_image(encode(picture, "PNG" if mode not in ("CMYK",) else "TIFF"))
    turns = {1: 0, 3: 2, 6: -1, 8: 1}
    expected = np.asarray(upright)
    expected = expected.swapaxes(0, 1) if orientation == 5 else np.rot90(expected, turns[orientation])
    assert np.array_equal(np.asarray(from_path), expected)
    assert image_size_hw(ImageInput(path=str(tmp_path / "a.tif"))) == expected.shape[:2]


def test_grey_with_alpha_palette_with_transparency_and_animations() -> None:
    grey = np.array([[[200, 0], [200, 255]]], np.uint8)
    loaded = np.asarray(load_image(encode(Image.fromarray(grey, "LA"), "PNG")))
    assert loaded[0].tolist() == [[255] * 3, [200] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    loaded = np.asarray(load_image(encode(palette, "PNG", transparency=0)))
    assert loaded[0].tolist() == [[255, 255, 255], [200, 0, 0]]
    frames = [Image.new("RGB", (5, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for format, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        moving = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (image_size_hw(moving), load_image(moving).getpixel((0, 0))) == ((4, 5), (255, 0, 0))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    loaded = np.asarray(load_image(encode(Image.fromarray(values), "PNG")))
    assert loaded.shape == (1, 4, 3)
    assert loaded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparency_is_shown_on_white_and_opaque_alpha_changes_nothing() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = 0, 255, 51
    loaded = np.asarray(load_image(encode(Image.fromarray(rgba), "PNG")))
    assert loaded[0].tolist() == [[255, 255, 255], [200, 0, 0], [244, 204, 204]]
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    pixels[..., 3] = 255
    assert np.array_equal(np.asarray(load_image(encode(Image.fromarray(pixels), "PNG"))), pixels[..., :3])


def test_palette_grey_bilevel_and_cmyk() -> None:
    palette = marked().convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(np.asarray(load_image(encode(palette, "PNG"))), np.asarray(palette.convert("RGB")))
    assert load_image(encode(Image.new("L", (3, 2), 7), "PNG")).getpixel((0, 0)) == (7, 7, 7)
    assert load_image(encode(Image.new("1", (3, 2), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    cmyk = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.allclose(cmyk.getpixel((4, 4)), (255, 0, 0), atol=4)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT" + zlib.compress(b"\0" * 99)) + chunk(b"IEND")


@pytest.mark.parametrize("allowed_elsewhere", [False, True])
def test_truncated_files_are_refused(monkeypatch: pytest.MonkeyPatch, allowed_elsewhere: bool) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", allowed_elsewhere)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for format in ("JPEG", "PNG"):
        data = encode(noise, format).data or b""
        assert load_image(ImageInput(data=data)).size == (64, 64)
        cut = ImageInput(data=data[: len(data) // 2])
        with pytest.raises(DataFormatError, match=r"record 'r' \(t.jsonl:3\): image is truncated.*fix: "):
            load_image(cut, "r", "t.jsonl:3")
        assert image_size_hw(cut) == (64, 64)  # the header alone is whole


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    cases: list[tuple[ImageInput, str]] = [
        (ImageInput(path=str(tmp_path / "none.jpg")), "image file not found"),
        (ImageInput(path=str(tmp_path / "empty.jpg")), "0 bytes"),
        (ImageInput(path=str(tmp_path / "text.jpg")), "not an image"),
        (ImageInput(path=str(tmp_path)), "not a file"),
        (ImageInput(path="a\0b"), "cannot be opened"),
        (ImageInput(path="x" * 5000), "cannot be opened"),
        (ImageInput(data=b""), "0 bytes"),
        (ImageInput(data=bomb(60_000, 60_000)), "too large"),
        (encode(Image.new("F", (2, 2)), "TIFF"), "cannot be converted"),
    ]
    for image, expected in cases:
        with pytest.raises(DataFormatError) as caught:
            load_image(image, "the-record", "f.json[2]")
        assert expected in str(caught.value)
        assert "record 'the-record' (f.json[2])" in str(caught.value)
        assert "fix: " in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_noise_in_image_files_never_escapes() -> None:
    rng = random.Random(0)
    sources = [
        encode(marked().resize((40, 30)), format, **options)
        for format, options in (
            ("PNG", {}),
            ("JPEG", {}),
            ("GIF", {}),
            ("WEBP", {}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("BMP", {}),
        )
    ]
    for _ in range(300):
        data = bytearray(rng.choice(sources).data or b"")
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        image = ImageInput(data=bytes(data[: rng.randint(len(data) // 2, len(data))]))
        for function in (load_image, image_size_hw):
            with contextlib.suppress(DataFormatError):
                function(image, "r")

"""Opens one image of a record as upright 8-bit RGB; every way a file can be bad becomes a `DataFormatError`.

No resizing and no tensors. EXIF orientation is applied exactly once; the result carries no EXIF, so that nobody
applies it again.
"""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import ExifTags, Image, ImageFile

from finetune.data.containers import is_embedded, read_embedded
from finetune.errors import DataFormatError
from finetune.schema import ImageInput

MAX_PIXELS = 2 * 89_478_485
"""Where Pillow refuses a file as a decompression bomb; about 179 megapixels."""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def load_image(image: ImageInput, record_id: str | None = None, source: str | None = None) -> Image.Image:
    """One image as mode RGB, EXIF orientation applied, without metadata.

    16-bit grey is scaled to 8 bit (v / 257, not clipped), grey is repeated, a palette is looked up, CMYK is converted
    without a colour profile, transparency is shown on white as a viewer would, an animation gives its first frame.

    Args:
        image: path or encoded bytes.
        record_id, source: named in the error.

    Raises:
        DataFormatError: missing, empty, truncated, oversized or not an image.
    """
    return to_rgb_image(decode(image, record_id, source), record_id, source)


def image_size_hw(image: ImageInput, record_id: str | None = None, source: str | None = None) -> tuple[int, int]:
    """(H, W) as `load_image` would return it, read from the header alone.

    Raises:
        DataFormatError: missing, empty, oversized or not an image; a truncated body is not noticed (`seems_cut_off`).
    """
    with _open(image, record_id, source, "images") as opened:
        width, height = opened.size
        return (width, height) if orientation(opened) in _SIDEWAYS else (height, width)


def missing_file_advice(path: str) -> str:
    """What to do about a file that is not there."""
    return "check the path and the data root" + (" (write / instead of \\)" if "\\" in path else "")


def seems_cut_off(path: str | os.PathLike[str]) -> bool:
    """Whether a JPEG, PNG or WebP file lacks its end, judged by a few bytes; decoding alone is proof.

    A file may be whole all the same (a JPEG with something behind its end), and damaged elsewhere.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(12)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 32))
            tail = file.read()
    except OSError:
        return False  # whoever opens it says why it cannot be
    if head.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in tail
    if head.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return int.from_bytes(head[4:8], "little") + 8 > size
    return False


def is_sideways(image: ImageInput, record_id: str | None = None, source: str | None = None) -> bool:
    """Whether EXIF orientation swaps the stored width and height (for hints in error messages)."""
    with _open(image, record_id, source, "images") as opened:
        return orientation(opened) in _SIDEWAYS


def exif_orientation(image: ImageInput, record_id: str | None = None, source: str | None = None) -> int:
    """EXIF orientation 1..8 between the pixels as stored and the upright image, TIFF included."""
    with _open(image, record_id, source, "images") as opened:
        if opened.format == "TIFF":
            value = opened.tag_v2.get(ExifTags.Base.Orientation, 1)  # type: ignore[attr-defined]
            return value if value in _TRANSPOSE else 1
        return orientation(opened)


def decode(
    image: ImageInput, record_id: str | None = None, source: str | None = None, field: str = "images"
) -> Image.Image:
    """The image in its own mode, upright, fully decoded; `format` is kept.

    Raises:
        DataFormatError: as `load_image`.
    """
    # Another library may have switched this on; it would fill the lost part of a truncated image with grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    opened = _open(image, record_id, source, field)
    try:
        turn = _TRANSPOSE.get(orientation(opened))
        opened.load()
        upright = opened.copy() if turn is None else opened.transpose(turn)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on damaged data
        raise DataFormatError(
            f"image is truncated or damaged ({str(error)[:80]})",
            record=record_id,
            source=source,
            field=field,
            found=_name(image),
            fix="copy or download the file again, or remove the record",
        ) from error
    finally:
        opened.close()
    upright.format = opened.format
    upright.info = {key: value for key, value in upright.info.items() if key == "transparency"}
    return upright


def orientation(opened: Image.Image) -> int:
    """EXIF (or XMP) orientation 1..8 still to be applied, read from the header of a not yet loaded image.

    1 where there is none or the metadata are damaged (viewers ignore them too), and for TIFF, which Pillow turns.
    """
    if opened.format == "TIFF":
        return 1
    try:
        # Not opened.getexif(): for PNG that decodes the whole file in search of a late eXIf chunk.
        value = Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF raises SyntaxError, struct.error, ...; the pixels are still good
        return 1
    return value if value in _TRANSPOSE else 1


def to_rgb_image(image: Image.Image, record_id: str | None = None, source: str | None = None) -> Image.Image:
    """Any Pillow mode to RGB by the rules of `load_image`.

    Raises:
        DataFormatError: a float or 32-bit image whose range is unknown.
    """
    try:
        if image.mode.startswith("I"):  # I;16, I;16B, I: Pillow's own conversion clips at 255
            values = np.asarray(image).astype(np.int64)  # (H, W)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(f"values {values.min()}..{values.max()} of a 32-bit image")
            rgb = Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
        elif image.mode == "F":
            raise ValueError("floating-point pixels")
        elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            rgb = Image.alpha_composite(white, rgba).convert("RGB")  # exact where alpha is 255
        else:
            rgb = image.convert("RGB")
    except ValueError as error:
        raise DataFormatError(
            f"pixels cannot be converted to 8-bit RGB ({error})",
            record=record_id,
            source=source,
            field="images",
            found=f"mode {image.mode}",
            fix="save the image as 8-bit RGB",
        ) from error
    rgb.info = {}
    return rgb


def _open(image: ImageInput, record_id: str | None, source: str | None, field: str) -> Image.Image:
    """The opened, not yet decoded image, its size checked."""

    def refuse(problem: str, fix: str) -> DataFormatError:
        return DataFormatError(problem, record=record_id, source=source, field=field, found=_name(image), fix=fix)

    data = image.data
    if image.path is not None and is_embedded(image.path):
        try:
            data = read_embedded(image.path)
        except DataFormatError as error:
            raise refuse(error.problem, error.fix or "check the path") from error
        num_bytes = len(data)
    elif image.path is not None:
        try:
            num_bytes = os.stat(image.path).st_size
        except FileNotFoundError as error:
            raise refuse("image file not found", missing_file_advice(image.path)) from error
        except (OSError, ValueError) as error:
            raise refuse(f"image file cannot be opened ({error})", "check the path and its permissions") from error
        if not os.path.isfile(image.path):
            raise refuse("image path is not a file", "give the path of an image file")
    else:
        num_bytes = len(data or b"")
    if num_bytes == 0:
        raise refuse("image file is empty (0 bytes)", "copy or download the file again")
    try:
        opened = Image.open(image.path or "" if data is None else io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise refuse(f"image is too large ({str(error)[:80]})", "resize it, or remove the record") from error
    except PermissionError as error:
        raise refuse("image file cannot be opened (permission denied)", "check its permissions") from error
    except Exception as error:  # UnidentifiedImageError, and whatever a plugin raises on a damaged header
        raise refuse("not an image that Pillow can open", "save it as JPEG or PNG, or correct the path") from error
    if opened.width * opened.height > MAX_PIXELS:  # Pillow's own check may have been switched off
        opened.close()
        raise refuse(f"image is too large ({opened.width}x{opened.height} pixels)", "resize it, or remove the record")
    if opened.format == "TIFF":
        # Without a name Pillow (13.0) does not map the file into memory; where it does (uncompressed grey, palette,
        # CMYK), a sideways orientation makes it read the rows at the turned width and scrambles the pixels.
        opened.filename = ""
    return opened


def _name(image: ImageInput) -> str:
    return image.path if image.path is not None else f"{len(image.data or b'')} embedded bytes"

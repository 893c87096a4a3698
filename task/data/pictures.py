"""A picture file to one image: [C, H, W] float32 in [0, 255], C = 1 (gray) or 3, of any size.

Pillow decodes the file. Layouts that it reads as something else are read here or refused.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from task.checks import require

PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")

UNREAD = (
    "it is damaged, or no PNG, JPEG, BMP, TIFF, GIF or WebP file, or a TIFF file of another layout "
    "than 1, 2, 4, 8, 12 or 16 bits of gray, or 8 or 16 of colors (some of them, with 12 bits or "
    "white is zero, in one byte order alone)"
)

WHITE_IS_ZERO, YCBCR = 0, 6
JPEG_IN_TIFF = (6, 7)
UNSIGNED = 1


def decode_picture(path: Path) -> Tensor:
    """Decode a PNG, JPEG, BMP, TIFF, GIF or WebP file.

    Gray is scaled from the bits that the file declares; white is bright, whichever number it has.
    Palettes and CMYK (without its profile) become RGB. What is transparent becomes black, the
    background of medical images. The rotation that a camera noted in EXIF is applied.

    Raises:
        OSError: it is missing, damaged or of another format.
        ValueError: it has several frames, or its numbers have no known range or meaning.
    """
    with path.open("rb") as file, _open(file) as opened:
        frames = getattr(opened, "n_frames", 1)
        # Cameras put a preview into JPEG files (then called MPO) as a second frame.
        if frames > 1 and opened.format != "MPO":
            raise ValueError(f"it has {frames} frames; store one image per file")
        _check_layout(opened)
        _scale_transparent_gray(opened)
        ends = _deep_ends(opened)
        picture = ImageOps.exif_transpose(opened)
        if ends is not None:
            return _planes(_deep_gray(picture, *ends))
        if picture.mode in ("I", "F", "LAB"):
            raise ValueError(
                f"pixels of mode {picture.mode} have no known range; store gray or RGB of 8 bits, "
                "or gray of 16"
            )
        if picture.mode == "La":  # the only mode that Pillow converts in two steps
            picture = picture.convert("LA")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
            picture = Image.alpha_composite(black, picture)
        gray = picture.mode in ("1", "L")
        return _planes(np.asarray(picture.convert("L" if gray else "RGB"), dtype=np.float32))


def picture_size(path: Path) -> tuple[int, int]:
    """Read width and height of a picture from its header; errors as in `decode_picture`."""
    with path.open("rb") as file, _open(file) as opened:
        return opened.size


def _open(file: BinaryIO) -> Image.Image:
    # Not by name: Pillow may map such a file into memory, and confuses the sides of a TIFF file
    # then that is to be turned.
    try:
        return Image.open(file, formats=PICTURE_FORMATS)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(UNREAD) from error


def _check_layout(opened: Image.Image) -> None:
    """Refuse the layouts that Pillow opens and takes for others."""
    color_key = isinstance(opened.info.get("transparency"), tuple)
    if isinstance(opened, PngImagePlugin.PngImageFile) and color_key:
        bits = 16 if str(opened.tile[0].args).endswith("16B") else 8
        require(bits == 8, "bits of a PNG file with a transparent color", "8", bits)
    if not isinstance(opened, TiffImagePlugin.TiffImageFile):
        return
    tags = opened.tag_v2
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    formats = tags.get(TiffImagePlugin.SAMPLEFORMAT, (UNSIGNED,))
    require(set(formats) == {UNSIGNED}, "SampleFormat", "1 (whole numbers, no sign)", formats)
    planar = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1)
    require(planar == 1 or bits <= 8, "PlanarConfiguration", f"1 with {bits} bits", planar)
    require(
        tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) != YCBCR
        or tags.get(TiffImagePlugin.COMPRESSION) in JPEG_IN_TIFF,
        "PhotometricInterpretation",
        "RGB unless JPEG compresses the file",
        "YCbCr",
    )


def _scale_transparent_gray(opened: Image.Image) -> None:
    """Scale the transparent gray of a PNG file of 2 or 4 bits, as Pillow scales its pixels."""
    if isinstance(opened, PngImagePlugin.PngImageFile) and "transparency" in opened.info:
        top = {"L;2": 3, "L;4": 15}.get(str(opened.tile[0].args))
        if top is not None:
            opened.info["transparency"] *= 255 // top


def _deep_ends(opened: Image.Image) -> tuple[int, int] | None:
    """Return the values of black and white where there are more than 256 grays."""
    if not opened.mode.startswith("I;16"):
        return None
    tags = getattr(opened, "tag_v2", {})
    top = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    return (top, 0) if inverted else (0, top)


def _deep_gray(picture: Image.Image, black: int, white: int) -> np.ndarray:
    values = np.asarray(picture, dtype=np.float32)
    shown: np.ndarray = (values - black) * (255 / (white - black))
    shown[values == picture.info.get("transparency")] = 0
    return shown


def _planes(pixels: np.ndarray) -> Tensor:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

"""One file to one image: [C, H, W] float32 in [0, 255], C = 1 (grey) or 3, of any size."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from task.config import DATA_FITS, require, require_one_of
from task.data.images import resize

PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")

# JPEG leaves the black around a fundus photograph a little grey.
BLACK = 16

# ITU-R BT.601, as Pillow's own conversion to grey.
LUMA = torch.tensor([0.299, 0.587, 0.114])


def decode_picture(path: Path) -> Tensor:
    """Decode a PNG, JPEG, BMP or TIFF file.

    16-bit grey is scaled by 255 / 65535; palettes become colours; what is transparent becomes
    black, the background of medical images; the rotation that a camera noted in EXIF is applied.

    Raises:
        OSError: it is missing, damaged or of another format.
        ValueError: it has several frames, or numbers without a known range.
    """
    with Image.open(path, formats=PICTURE_FORMATS) as opened:
        frames = getattr(opened, "n_frames", 1)
        # Cameras put a preview into JPEG files as a second frame.
        if opened.format == "TIFF" and frames > 1:
            raise ValueError(f"it has {frames} frames; store one image per file")
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16"):
            return _planes(np.asarray(picture, dtype=np.float32) * (255 / 65535))
        if picture.mode in ("I", "F"):
            raise ValueError(
                f"pixels of mode {picture.mode} have no known range; store 8 or 16 bits"
            )
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
            picture = Image.alpha_composite(black, picture)
        grey = picture.mode in ("1", "L")
        return _planes(np.asarray(picture.convert("L" if grey else "RGB"), dtype=np.float32))


def picture_size(path: Path) -> tuple[int, int]:
    """Read width and height of a picture from its header; errors as in `decode_picture`."""
    with Image.open(path, formats=PICTURE_FORMATS) as opened:
        return opened.size


def dicom_size(path: Path) -> tuple[int, int]:
    """Read width and height of a DICOM file from its header; errors as in `decode_dicom`."""
    # Imported here because only DICOM folders need it.
    from pydicom import dcmread

    file = dcmread(path, stop_before_pixels=True)
    return int(file.Columns), int(file.Rows)


def decode_dicom(path: Path, window: tuple[float, float] | None = None) -> Tensor:
    """Decode a single-frame DICOM file: rescale, window, and black where MONOCHROME1 has white.

    Args:
        path: of the file.
        window: center and width in rescaled units (Hounsfield for CT); None: the file's own
            first window, or else from its smallest to its largest value.

    Raises:
        OSError: the file is missing.
        ValueError: it has several frames, or its pixels are neither grey nor 8-bit RGB.
        Exception: pydicom's many, where it is damaged or needs a decoder that is not installed.

    Source: DICOM PS3.3 C.11.1 (rescale) and C.11.2.1.2 (linear window).
    """
    # Imported here because only DICOM folders need it.
    from pydicom import dcmread
    from pydicom.pixels.processing import apply_modality_lut

    file = dcmread(path)
    frames = int(file.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ValueError(f"it has {frames} frames; store one frame per file")
    kind = str(file.PhotometricInterpretation)
    if kind == "RGB" or kind.startswith("YBR"):
        require(int(file.BitsAllocated) == 8, "BitsAllocated", f"8 with {kind}", file.BitsAllocated)
        return _planes(file.pixel_array.astype(np.float32))  # pydicom turns YBR into RGB
    require(
        kind in ("MONOCHROME1", "MONOCHROME2"),
        "PhotometricInterpretation",
        "MONOCHROME1, MONOCHROME2, RGB or YBR",
        kind,
    )
    values = np.asarray(apply_modality_lut(file.pixel_array, file), dtype=np.float64)
    if window is None:
        window = _own_window(file.get("WindowCenter"), file.get("WindowWidth"))
    pixels = _stretch(values) if window is None else apply_window(values, *window)
    return _planes((255 - pixels if kind == "MONOCHROME1" else pixels).astype(np.float32))


def _own_window(center: object, width: object) -> tuple[float, float] | None:
    # Either may be absent, empty, one number or several, of alternative windows.
    centers, widths = (np.atleast_1d(np.array(v or [], dtype=np.float64)) for v in (center, width))
    return (float(centers[0]), float(widths[0])) if len(centers) and len(widths) else None


def _stretch(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    stretched: np.ndarray = (values - low) * (255 / max(high - low, 1e-12))
    return stretched


def apply_window(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """Map the window linearly to [0, 255] and cut off what lies outside.

    Args:
        values: rescaled pixel values, float64.
        center: of the window, in their unit.
        width: of the window, > 1, in their unit.

    Source: DICOM PS3.3 C.11.2.1.2.1.
    """
    require(width > 1, "window width", "> 1", width)
    windowed: np.ndarray = ((values - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1) * 255
    return windowed


def crop_round_field(pixels: Tensor) -> Tensor:
    """Cut the central square out of the round field of a fundus photograph.

    Args:
        pixels: [C, H, W] in [0, 255], black around the field.

    Returns:
        [C, S, S], S the shorter side of the smallest box around everything that is not black.

    Raises:
        ValueError: all of it is black.
    """
    bright = pixels.amax(0) > BLACK
    if not bright.any():
        raise ValueError("all of it is black")
    rows, columns = (torch.nonzero(bright.any(axis)).flatten() for axis in (1, 0))
    (top, bottom), (left, right) = ((int(s[0]), int(s[-1]) + 1) for s in (rows, columns))
    side = min(bottom - top, right - left)
    top += (bottom - top - side) // 2
    left += (right - left - side) // 2
    return pixels[:, top : top + side, left : left + side]


def to_square(pixels: Tensor, fit: str) -> Tensor:
    """Cut or pad an image to a square of its own resolution.

    Args:
        pixels: [C, H, W] in [0, 255].
        fit: "crop" takes the largest square in the middle, "pad" adds 0 on both sides of the
            shorter side, "stretch" leaves the image as it is, to be stretched in resizing.

    Returns:
        [C, S, S] with "crop" and "pad".

    Raises:
        ValueError: `fit` is another.
    """
    require_one_of("data.fit", fit, DATA_FITS)
    if fit == "stretch":
        return pixels
    height, width = pixels.shape[-2:]
    side = min(height, width) if fit == "crop" else max(height, width)
    more_rows, more_columns = side - height, side - width  # negative to crop, as `pad` takes them
    left, top = more_columns // 2, more_rows // 2
    return F.pad(pixels, [left, more_columns - left, top, more_rows - top])


def resize_decoded(pixels: Tensor, image_size: int, channels: int) -> Tensor:
    """Bring a decoded image to the shape that the model sees.

    Args:
        pixels: [C, H, W] float32 in [0, 255].
        image_size: height and width; other proportions are stretched, as the paper's code does.
        channels: 1 turns colours into grey, 3 repeats grey.

    Returns:
        [channels, image_size, image_size] uint8.
    """
    if len(pixels) > channels:
        pixels = (pixels * LUMA[:, None, None]).sum(0, keepdim=True)
    return resize(pixels[None], image_size)[0].expand(channels, -1, -1)


def _planes(pixels: np.ndarray) -> Tensor:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

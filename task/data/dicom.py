"""A DICOM file to one image: [C, H, W] float32 in [0, 255], C = 1 (gray) or 3, of any size.

pydicom reads the file and applies its tables and windows. What decides what a pixel means is
read here, or the file is refused with the reason.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from task.checks import require

if TYPE_CHECKING:
    from pydicom import Dataset

MONOCHROME = ("MONOCHROME1", "MONOCHROME2")

# An Enhanced CT or MR file says here, for all frames or for each, what other files say at the top.
FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
GROUPS_READ = ("PixelMeasures", "PixelValueTransformation", "FrameVOILUT")

# The first that is there holds the distance between rows and that between columns, in mm.
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
MAX_ASPECT = 10

WINDOW = ("WindowCenter", "WindowWidth")

# Written as text, which may say NaN or be too large for a number.
DECIMALS = ("RescaleSlope", "RescaleIntercept", "DoseGridScaling", *WINDOW)

# An element that is there and empty says as much as one that is not.
OPTIONAL = (
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *(*WINDOW, "VOILUTFunction", "VOILUTSequence"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PresentationLUTShape", *SPACINGS),
)

INSTALL = "install what reads it: uv sync --extra dicom, or pip install 'feddm[dicom]'"


def dicom_size(path: Path) -> tuple[int, int]:
    """Read width and height of a DICOM file from its header; errors as in `decode_dicom`."""
    # Imported here, as below, because only DICOM folders need it.
    from pydicom import dcmread

    file = dcmread(path, stop_before_pixels=True)
    return int(file.Columns), int(file.Rows)


def decode_dicom(path: Path, window: tuple[float, float] | None = None) -> Tensor:
    """Decode a DICOM file of one frame to what a viewer shows, with 0 as its darkest value.

    Gray values pass the modality LUT (or rescale), then `window`, or else the file's own VOI LUT,
    or else its own first window, or else they are stretched from the smallest to the largest. Then
    MONOCHROME1 is inverted. Padding is 0. Palettes and YBR become RGB. Pixels that are not square
    are interpolated to square ones.

    Args:
        path: of the file.
        window: center and width in rescaled units (Hounsfield for CT), linear.

    Raises:
        OSError: the file cannot be opened.
        ValueError: anything else, with the reason in one line: it is damaged, has several frames,
            needs a decoder that is not installed, or its pixels mean what is not known here.

    Source: DICOM PS3.3 C.11.1 (modality), C.11.2 (VOI), C.7.6.3 (pixels), C.7.5.1.1.2 (padding).
    """
    from pydicom import dcmread

    try:
        file = dcmread(path)
        _check_image(file)
        _lift_functional_groups(file)
        raw, kind = _decompress(file)
        gray = kind in MONOCHROME
        pixels = _gray(raw, file, window) if gray else _color(raw, file, kind)
        return _square_pixels(torch.from_numpy(pixels.astype(np.float32)), file)
    except (OSError, MemoryError):
        raise
    # Damaged files make pydicom raise nearly anything, over several lines.
    except Exception as error:
        reason = " ".join(str(error).split())
        named = reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
        raise ValueError(named) from error


def _check_image(file: "Dataset") -> None:
    if "FloatPixelData" in file or "DoubleFloatPixelData" in file:
        raise ValueError("it holds floating-point pixels, which have no known range")
    if "PixelData" not in file:
        kind = file.get("SOPClassUID", "unknown SOP class")
        raise ValueError(f"it holds no image ({getattr(kind, 'name', kind)})")
    frames = str(file.get("NumberOfFrames") or 1)
    if frames != "1":
        raise ValueError(f"it has {frames} frames; store one frame per file")


def _lift_functional_groups(file: "Dataset") -> None:
    """Write what holds for the one frame to the top, where other files have it."""
    for groups in FUNCTIONAL_GROUPS:
        for group in file.get(groups) or []:
            for name in GROUPS_READ:
                for item in group.get(f"{name}Sequence") or []:
                    file.update(item)
            presentation = [
                item.get("PixelPresentation")
                for keyword in ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence")
                for item in group.get(keyword) or []
            ]
            file.PixelPresentation = next(filter(None, presentation), file.get("PixelPresentation"))
    for keyword in OPTIONAL:
        if keyword in file and file[keyword].VM == 0:
            del file[keyword]
    shown = file.get("PixelPresentation") or "MONOCHROME"
    require(shown not in ("COLOR", "MIXED"), "PixelPresentation", "MONOCHROME", shown)


def _decompress(file: "Dataset") -> tuple[np.ndarray, str]:
    """Return the stored values, [H, W] or [H, W, 3], and the PhotometricInterpretation of them."""
    from pydicom.pixels.decoders.base import get_decoder

    require("TransferSyntaxUID" in file.file_meta, "TransferSyntaxUID", "there", None)
    syntax = file.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not get_decoder(syntax).is_available:
        raise ValueError(f"it is compressed as {syntax.name}; {INSTALL}")
    stored, high = int(file.BitsStored), int(file.HighBit)
    require(high == stored - 1, "HighBit", f"{stored - 1} with BitsStored {stored}", high)
    try:
        # The bits above those stored tell padding from values. (Its options are typed as one.)
        raw, properties = get_decoder(syntax).as_array(file, correct_unused_bits=False)  # type: ignore[arg-type]
    except RuntimeError as error:  # every decoder that is installed failed
        more = "" if find_spec("gdcm") else f"; where it is not damaged, {INSTALL}"
        raise ValueError(f"{error}{more}") from error
    return raw, str(properties["photometric_interpretation"])


def _color(raw: np.ndarray, file: "Dataset", kind: str) -> np.ndarray:
    """Return RGB, [3, H, W] in [0, 255]."""
    from pydicom.pixels.processing import apply_color_lut

    bits, values = int(file.BitsStored), _stored_bits(raw, file)
    if kind == "PALETTE COLOR":
        bits = int(file.RedPaletteColorLookupTableDescriptor[2])
        swapped = bits == 16 and not file.file_meta.TransferSyntaxUID.is_little_endian
        # pydicom reads segmented tables in the order of the file, and others as little-endian.
        require(
            not swapped or "SegmentedRedPaletteColorLookupTableData" in file,
            "TransferSyntaxUID",
            "little-endian with a palette of 16 bits",
            file.file_meta.TransferSyntaxUID.name,
        )
        values, kind = apply_color_lut(values, file), "RGB"
    expected = "MONOCHROME1, MONOCHROME2, PALETTE COLOR, RGB, or YBR of 8 bits"
    require(kind == "RGB" and values.shape[2:] == (3,), "PhotometricInterpretation", expected, kind)
    require(not int(file.PixelRepresentation), "PixelRepresentation", "0 with colors", 1)
    colors: np.ndarray = values.transpose(2, 0, 1) * (255 / (2**bits - 1))
    return colors


def _gray(raw: np.ndarray, file: "Dataset", window: tuple[float, float] | None) -> np.ndarray:
    """Return what is shown of gray values, [1, H, W] in [0, 255]."""
    inverted = file.PhotometricInterpretation == "MONOCHROME1"
    shape = "INVERSE" if inverted else "IDENTITY"
    require(
        file.get("PresentationLUTShape", shape) == shape and "PresentationLUTSequence" not in file,
        "PresentationLUTShape",
        f"{shape} with {file.PhotometricInterpretation}, and no table",
        file.get("PresentationLUTShape"),
    )
    require(raw.ndim == 2, "SamplesPerPixel", "1 with gray values", int(file.SamplesPerPixel))
    for name in filter(file.__contains__, DECIMALS):
        numbers = np.ravel(file[name].value).astype(float)
        require(bool(np.isfinite(numbers).all()), name, "finite", numbers.tolist())
    padding = _padding(raw, file)
    if padding.all():
        raise ValueError("every pixel is padding (PixelPaddingValue)")
    shown = _show(_rescale(_stored_bits(raw, file), file), padding, file, window)
    shown = 255 - shown if inverted else shown
    shown[padding] = 0
    return shown[None]


def _padding(raw: np.ndarray, file: "Dataset") -> np.ndarray:
    """Tell which pixels only fill the rectangle, [H, W] bool."""
    if "PixelPaddingValue" not in file:
        return np.zeros(raw.shape, dtype=bool)
    # Its sign does not always follow PixelRepresentation, its bits do.
    bits, signed = int(file.BitsAllocated), raw.dtype.kind == "i"
    first = int(file.PixelPaddingValue)
    ends = [
        (end + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) if signed else end % 2**bits
        for end in (first, int(file.get("PixelPaddingRangeLimit", first)))
    ]
    padding: np.ndarray = (raw >= min(ends)) & (raw <= max(ends))
    return padding


def _stored_bits(raw: np.ndarray, file: "Dataset") -> np.ndarray:
    """Return the values of the bits stored, signed integers: bits above may hold overlays."""
    bits = int(file.BitsStored)
    values: np.ndarray = raw.astype(np.int32 if raw.itemsize <= 2 else np.int64) & (2**bits - 1)
    if int(file.PixelRepresentation):
        values -= (values >> (bits - 1)) << bits
    return values


def _rescale(values: np.ndarray, file: "Dataset") -> np.ndarray:
    from pydicom.pixels.processing import apply_modality_lut

    slope, intercept = file.get("RescaleSlope"), file.get("RescaleIntercept")
    require(
        (slope is None) == (intercept is None) and slope != 0,
        "RescaleSlope and RescaleIntercept",
        "both there, the slope not 0, or neither",
        (slope, intercept),
    )
    for item in file.get("ModalityLUTSequence", []):
        # Its values are of a unit and have no range; pydicom knows tables of 8 and of 16 bits.
        item.add_new("LUTDescriptor", "SL", [*item.LUTDescriptor[:2], 16])
    dose_scale = float(file.get("DoseGridScaling", 1))
    rescaled: np.ndarray = apply_modality_lut(values, file) * dose_scale
    return rescaled


def _show(
    values: np.ndarray, padding: np.ndarray, file: "Dataset", window: tuple[float, float] | None
) -> np.ndarray:
    """Choose what is shown of the rescaled values, as float64 in [0, 255]."""
    if window is not None:
        return _apply_window(values, *window)
    if "VOILUTSequence" in file:
        return _apply_voi_lut(values, file)
    own = [float(np.ravel(file[name].value)[0]) if name in file else None for name in WINDOW]
    center, width = own
    if center is not None and width is not None:
        return _apply_window(values, center, width, str(file.get("VOILUTFunction", "LINEAR")))
    require(center is width, " and ".join(WINDOW), "both there or neither; data.window wins", own)
    low, high = float(values[~padding].min()), float(values[~padding].max())
    stretched: np.ndarray = ((values - low) * (255 / max(high - low, 1e-12))).clip(0, 255)
    return stretched


def _apply_window(
    values: np.ndarray, center: float, width: float, function: str = "LINEAR"
) -> np.ndarray:
    """Map a window to [0, 255] and cut off what lies outside.

    Args:
        values: rescaled pixel values.
        center: of the window, in their unit.
        width: of the window, in their unit; >= 1, for LINEAR_EXACT and SIGMOID > 0.
        function: VOILUTFunction, one of LINEAR, LINEAR_EXACT and SIGMOID.

    Raises:
        ValueError: an argument is another.

    Source: DICOM PS3.3 C.11.2.1.2.1 and C.11.2.1.3.
    """
    from pydicom import Dataset
    from pydicom.pixels.processing import apply_windowing

    function = function.upper()
    allowed = width >= 1 if function == "LINEAR" else width > 0
    limit = ">= 1" if function == "LINEAR" else "> 0"
    require(allowed, "WindowWidth", f"{limit} with {function} (data.window wins)", width)
    # pydicom maps to the range of the stored bits: 8 of them, without sign, are [0, 255].
    shown = Dataset()
    shown.PhotometricInterpretation, shown.VOILUTFunction = "MONOCHROME2", function
    shown.BitsStored, shown.PixelRepresentation = 8, 0
    # FD, because decimal strings hold 16 characters.
    for name, value in zip(WINDOW, (center, width), strict=True):
        shown.add_new(name, "FD", value)
    with np.errstate(over="ignore"):  # e to the power of what lies far below a sigmoid
        windowed: np.ndarray = apply_windowing(values, shown)
    return windowed


def _apply_voi_lut(values: np.ndarray, file: "Dataset") -> np.ndarray:
    from pydicom.pixels.processing import apply_voi

    item = file.VOILUTSequence[0]
    entries, first, bits = item.LUTDescriptor
    entries = entries or 2**16
    # Its sign is that of the rescaled values, of which pydicom's reader knows nothing.
    if values.min() < 0 and first >= 2**15:
        first -= 2**16
    # pydicom counts entries in the type of the results, where 8 bits would overflow.
    item.add_new("LUTDescriptor", "SL", [entries % 2**16, first, 16])
    inside = np.clip(np.rint(values), first, first + entries - 1).astype(np.int64)
    found, top = apply_voi(inside, file), 2**bits - 1
    require(found.max() <= top, "VOILUTSequence", f"a table of values up to {top}", found.max())
    shown: np.ndarray = found * (255 / top)
    return shown


def _square_pixels(pixels: Tensor, file: "Dataset") -> Tensor:
    """Interpolate pixels that are higher than wide, or wider than high, to square ones."""
    known = [file[name].value for name in SPACINGS if name in file]
    # Scanners that do not know a distance write 0.
    spacing = next((each for each in known if min(map(float, each)) > 0), (1, 1))
    between_rows, between_columns = map(float, spacing)
    aspect = between_rows / between_columns
    require(
        1 / MAX_ASPECT <= aspect <= MAX_ASPECT,
        "PixelSpacing",
        f"of pixels at most {MAX_ASPECT} times as long as wide",
        list(spacing),
    )
    height, width = pixels.shape[-2:]
    size = (round(height * max(aspect, 1)), round(width * max(1 / aspect, 1)))
    if size == (height, width):
        return pixels
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=False)[0]

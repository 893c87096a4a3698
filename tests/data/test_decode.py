"""Single files to pixels: what the numbers of picture and DICOM files mean."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import (
    apply_modality_lut,
    apply_voi_lut,
    apply_windowing,
    convert_color_space,
)
from pydicom.sequence import Sequence
from pydicom.uid import JPEGLossless
from torchvision.transforms import v2

from task.data.dicom import decode_dicom
from task.data.pictures import decode_picture, picture_size
from task.data.shape import crop_round_field, resize_decoded, to_square
from tests.image_files import HOUNSFIELD, RESCALED, picture, write_dicom, write_tiff

# The ramp from black to white that most files of these tests hold.
RAMP = np.arange(16 * 16).reshape(16, 16) / 255

# Pictures of every kind.


def test_pictures_are_resized_as_torchvision_does_without_antialiasing(tmp_path: Path) -> None:
    pixels = picture(0, size=30)[:, :20]
    Image.fromarray(pixels).save(tmp_path / "x.png")
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = v2.functional.resize(planes.float(), [16, 16], antialias=False)
    found = resize_decoded(decode_picture(tmp_path / "x.png"), 16, 3)
    assert found.dtype == torch.uint8
    assert (found.float() - expected).abs().max() <= 0.5 + 1e-4


def test_color_becomes_gray_as_in_pillow_and_gray_fills_three_channels(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "color.png")
    Image.fromarray(picture(1, channels=1)).save(tmp_path / "gray.png")
    gray = resize_decoded(decode_picture(tmp_path / "color.png"), 8, 1)[0].numpy().astype(int)
    expected = np.asarray(Image.fromarray(picture(0)).convert("L")).astype(int)
    assert np.abs(gray - expected).max() <= 1
    filled = resize_decoded(decode_picture(tmp_path / "gray.png"), 8, 3)
    assert np.array_equal(filled, np.stack([picture(1, channels=1)] * 3))


def test_gray_stored_as_color_loses_nothing_as_gray(tmp_path: Path) -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(np.stack([gray] * 3, axis=-1)).save(tmp_path / "x.png")
    assert np.array_equal(resize_decoded(decode_picture(tmp_path / "x.png"), 16, 1)[0], gray)


def test_16_bit_gray_is_scaled_and_not_cut_off(tmp_path: Path) -> None:
    for suffix in ("png", "tif"):
        values = np.array([[0, 257], [32768, 65535]], dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / f"x.{suffix}")
        found = resize_decoded(decode_picture(tmp_path / f"x.{suffix}"), 2, 1)
        assert found.flatten().tolist() == [0, 1, 128, 255]


def test_palettes_become_colors_and_transparency_black(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = (10, 200, 30)
    Image.fromarray(pixels).quantize(2).save(tmp_path / "palette.png")
    assert np.array_equal(decode_picture(tmp_path / "palette.png"), pixels.transpose(2, 0, 1))
    alpha = np.full((8, 8, 4), 255, np.uint8)
    alpha[:4, :, 3] = 0
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    found = decode_picture(tmp_path / "alpha.png")
    assert found.shape == (3, 8, 8) and found[:, :4].max() == 0 and found[:, 4:].min() == 255


def test_rotation_noted_by_the_camera_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((8, 4), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    found = decode_picture(tmp_path / "x.png")
    assert found.shape == (1, 4, 8) and found[0, :, -1].min() == 255 and found[0, :, 0].max() == 0


def pack_12_bits(values: np.ndarray) -> bytes:
    return b"".join(
        bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in values.reshape(-1, 2).tolist()
    )


def scaled(top: int, kind: str = "<u2") -> bytes:
    return np.rint(RAMP * top).astype(kind).tobytes()


@pytest.mark.parametrize(
    ("bits", "photometric", "data"),
    [
        (12, 1, pack_12_bits(np.rint(RAMP * 4095).astype(int))),
        (16, 1, scaled(65535)),
        (16, 0, (65535 - np.rint(RAMP * 65535)).astype("<u2").tobytes()),
        (8, 1, scaled(255, "u1")),
        (8, 0, (255 - np.rint(RAMP * 255)).astype("u1").tobytes()),
    ],
)
def test_gray_tiff_is_scaled_by_its_own_bits_and_white_is_bright(
    tmp_path: Path, bits: int, photometric: int, data: bytes
) -> None:
    write_tiff(tmp_path / "x.tif", data, (16, 16), {258: [bits], 262: [photometric]})
    assert np.abs(decode_picture(tmp_path / "x.tif")[0].numpy() - RAMP * 255).max() < 0.51
    assert picture_size(tmp_path / "x.tif") == (16, 16)


@pytest.mark.parametrize("photometric", [0, 1])
def test_tiff_of_one_bit_is_black_and_white(tmp_path: Path, photometric: int) -> None:
    ones = np.array([[1, 0, 0, 0, 0, 0, 0, 1]], np.uint8)
    write_tiff(
        tmp_path / "x.tif", np.packbits(ones).tobytes(), (8, 1), {258: [1], 262: [photometric]}
    )
    expected = ones * 255 if photometric else 255 - ones * 255
    assert np.array_equal(decode_picture(tmp_path / "x.tif")[0], expected)


def test_palette_of_tiff_has_colors_of_16_bits(tmp_path: Path) -> None:
    colors, chosen = picture(3, size=16).reshape(-1, 3), picture(4, channels=1)
    tags = {258: [8], 262: [3], 320: (colors.T.astype(int) * 257).flatten().tolist()}
    write_tiff(tmp_path / "x.tif", chosen.tobytes(), (8, 8), tags)
    assert np.array_equal(decode_picture(tmp_path / "x.tif"), colors[chosen].transpose(2, 0, 1))


@pytest.mark.parametrize("planar", [1, 2])
def test_colors_of_tiff_lie_by_pixel_or_by_plane(tmp_path: Path, planar: int) -> None:
    pixels = picture(3)
    stored = pixels if planar == 1 else pixels.transpose(2, 0, 1)
    tags = {258: [8, 8, 8], 262: [2], 284: [planar]}
    write_tiff(tmp_path / "x.tif", stored.tobytes(), (8, 8), tags)
    assert np.array_equal(decode_picture(tmp_path / "x.tif"), pixels.transpose(2, 0, 1))


def test_deep_colors_keep_their_upper_bits(tmp_path: Path) -> None:
    deep = picture(4).astype("<u2") * 257
    write_tiff(tmp_path / "x.tif", deep.tobytes(), (8, 8), {258: [16] * 3, 262: [2]})
    assert np.array_equal(decode_picture(tmp_path / "x.tif"), picture(4).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("tags", "data", "reason"),
    [
        ({258: [8], 262: [1], 339: [2]}, scaled(127, "i1"), "SampleFormat must be 1"),
        ({258: [16], 262: [1], 339: [2]}, scaled(32767), "SampleFormat must be 1"),
        ({258: [32], 262: [1]}, scaled(4095, "<u4"), "mode I have no known range"),
        ({258: [32], 262: [1], 339: [3]}, scaled(1, "<f4"), "SampleFormat must be 1"),
        ({258: [16] * 3, 262: [2], 284: [2]}, scaled(65535) * 3, "PlanarConfiguration must be 1"),
        ({258: [8] * 3, 262: [6]}, scaled(255, "u1") * 3, "PhotometricInterpretation must be RGB"),
        ({258: [8] * 3, 262: [8]}, scaled(255, "u1") * 3, "mode LAB"),
        ({258: [10], 262: [1]}, scaled(1023), "of another layout"),
    ],
)
def test_layouts_that_pillow_takes_for_others_are_refused(
    tmp_path: Path, tags: dict[int, list[int]], data: bytes, reason: str
) -> None:
    write_tiff(tmp_path / "x.tif", data, (16, 16), tags)
    with pytest.raises((ValueError, OSError), match=reason):
        decode_picture(tmp_path / "x.tif")


@pytest.mark.parametrize(
    ("name", "format"), [("x.png", "PNG"), ("x.gif", "GIF"), ("x.webp", "WEBP"), ("x.tif", "TIFF")]
)
def test_files_of_several_frames_are_refused_and_of_one_read(
    tmp_path: Path, name: str, format: str
) -> None:
    pages = [Image.fromarray(picture(seed)).quantize(16).convert("RGB") for seed in (0, 1)]
    options = {"lossless": True} if format == "WEBP" else {}
    pages[0].save(tmp_path / name, format, **options)
    assert np.array_equal(decode_picture(tmp_path / name), np.asarray(pages[0]).transpose(2, 0, 1))
    pages[0].save(tmp_path / name, format, save_all=True, append_images=pages[1:], **options)
    with pytest.raises(ValueError, match="2 frames; store one image per file"):
        decode_picture(tmp_path / name)


def test_other_and_damaged_formats_are_refused_with_what_is_read(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "x.png", format="PPM")
    with pytest.raises(OSError, match="no PNG, JPEG, BMP, TIFF, GIF or WebP file"):
        decode_picture(tmp_path / "x.png")


def test_jpeg_of_a_camera_held_upright_is_turned(tmp_path: Path) -> None:
    pixels = np.zeros((16, 8), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    found = decode_picture(tmp_path / "x.jpg")
    assert found.shape == (1, 8, 16) and found[0, :, 8:].min() > 250 and found[0, :, :8].max() < 5


def test_orientation_of_tiff_is_applied_once(tmp_path: Path) -> None:
    pixels = np.arange(8, dtype=np.uint8).reshape(4, 2)  # uncompressed in one strip
    tags = {258: [8], 262: [1], 274: [6]}
    write_tiff(tmp_path / "x.tif", pixels.tobytes(), (2, 4), tags)
    assert np.array_equal(decode_picture(tmp_path / "x.tif")[0], np.rot90(pixels, -1))


def test_cmyk_is_what_the_inks_leave_of_white(tmp_path: Path) -> None:
    inks = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    write_tiff(tmp_path / "x.tif", inks.tobytes(), (8, 8), {258: [8] * 4, 262: [5]})
    part = inks / 255
    expected = 255 * (1 - part[..., :3]) * (1 - part[..., 3:])
    assert (
        np.abs(decode_picture(tmp_path / "x.tif").numpy().transpose(1, 2, 0) - expected).max() <= 1
    )


@pytest.mark.parametrize(("mode", "premultiplied"), [("LA", False), ("La", True), ("RGBA", False)])
def test_half_transparent_pixels_are_half_as_bright(
    tmp_path: Path, mode: str, premultiplied: bool
) -> None:
    samples = 2 if mode != "RGBA" else 4
    pixels = np.full((8, 8, samples), 200, np.uint8)
    pixels[..., -1] = 128
    if premultiplied:
        pixels[..., 0] = round(200 * 128 / 255)
    photometric = 1 if samples == 2 else 2
    tags = {258: [8] * samples, 262: [photometric], 338: [1 if premultiplied else 2]}
    write_tiff(tmp_path / "x.tif", pixels.tobytes(), (8, 8), tags)
    assert (decode_picture(tmp_path / "x.tif") - 200 * 128 / 255).abs().max() <= 1


def write_png(
    path: Path,
    pixels: np.ndarray,
    color_type: int,
    *chunks: tuple[bytes, bytes],
    bits: int = 16,
) -> None:
    """Write PNG of 16, or 4 or 2 bits, with further chunks, which Pillow does not write."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + png_row(row, bits) for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts
        )
    )


def png_row(row: np.ndarray, bits: int) -> bytes:
    if bits == 16:
        return row.astype(">u2").tobytes()
    return bytes(np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, -bits:]))


@pytest.mark.parametrize("bits", [2, 4])
def test_transparent_gray_of_few_bits_is_black(tmp_path: Path, bits: int) -> None:
    top = 2**bits - 1
    values = np.array([[0, 1, 2, top]])
    write_png(tmp_path / "x.png", values, 0, (b"tRNS", struct.pack(">H", 2)), bits=bits)
    found = decode_picture(tmp_path / "x.png")[0].flatten().tolist()
    assert found == [0, 255 // top, 0, 255]


def test_transparent_gray_of_16_bits_is_black_and_of_deep_colors_refused(tmp_path: Path) -> None:
    values = np.array([[40000, 65535], [257, 40001]])
    write_png(tmp_path / "x.png", values, 0, (b"tRNS", struct.pack(">H", 40000)))
    found = decode_picture(tmp_path / "x.png").flatten().tolist()
    assert found == pytest.approx([0, 255, 1, 40001 / 257])
    colors = np.full((2, 2, 3), 40000)
    write_png(tmp_path / "x.png", colors, 2, (b"tRNS", struct.pack(">HHH", 40000, 40000, 40000)))
    with pytest.raises(ValueError, match="transparent color must be 8, got 16"):
        decode_picture(tmp_path / "x.png")


# Squares.


def test_odd_differences_of_the_sides_lose_no_row() -> None:
    pixels = torch.arange(1.0, 11).view(1, 5, 2)
    assert to_square(pixels, "crop").shape == (1, 2, 2)
    padded = to_square(pixels, "pad")
    assert padded.shape == (1, 5, 5) and torch.equal(padded[padded > 0], pixels.flatten())
    with pytest.raises(ValueError, match=r"data\.fit must be one of stretch, crop, pad, got 'cut'"):
        to_square(pixels, "cut")


def test_crop_round_field_finds_the_disc_wherever_it_is() -> None:
    pixels = torch.full((3, 50, 70), 9.0)  # what JPEG leaves of black
    rows, columns = torch.meshgrid(torch.arange(50), torch.arange(70), indexing="ij")
    pixels[:, (rows - 20) ** 2 + (columns - 45) ** 2 <= 15**2] = 200
    assert torch.equal(crop_round_field(pixels), pixels[:, 5:36, 30:61])
    # A field that the camera has cut off above and below: the square in its middle.
    assert torch.equal(crop_round_field(pixels[:, 10:31]), pixels[:, 10:31, 35:56])


def test_black_photographs_are_refused() -> None:
    with pytest.raises(ValueError, match="black"):
        crop_round_field(torch.zeros(3, 4, 4))


# DICOM.


def dicom_window(
    values: np.ndarray, center: float, width: float, function: str = "LINEAR"
) -> np.ndarray:
    """DICOM PS3.3 C.11.2.1.2.1 and C.11.2.1.3, word by word, for an output of 0 to 255."""
    if function == "SIGMOID":
        return 255 / (1 + np.exp(-4 * (values - center) / width))
    c, w = (center - 0.5, width - 1) if function == "LINEAR" else (center, width)
    between = ((values - c) / (w or 1) + 0.5) * 255
    return np.where(values <= c - w / 2, 0, np.where(values > c + w / 2, 255, between))


WINDOWS = [
    *((40, 400, "LINEAR"), (0, 400, "LINEAR"), (-600, 1500, "LINEAR"), (300.5, 2, "LINEAR")),
    *((500, 1, "LINEAR"), (500, 1, "LINEAR_EXACT"), (500.25, 0.5, "LINEAR_EXACT")),
    *((0, 300, "LINEAR_EXACT"), (40, 400, "SIGMOID"), (500, 0.01, "SIGMOID")),
]


@pytest.mark.parametrize(("center", "width", "function"), WINDOWS)
def test_windows_are_those_of_the_standard_and_of_pydicom(
    tmp_path: Path, center: float, width: float, function: str
) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (16, 16), dtype=np.uint16)
    file = tmp_path / "x.dcm"
    window = {"WindowCenter": [center, 7], "WindowWidth": [width, 9], "VOILUTFunction": function}
    write_dicom(file, values, **RESCALED, **window)
    found = decode_dicom(file)[0].numpy()
    hounsfield = values.astype(np.float64) - 1024
    with np.errstate(over="ignore"):
        reference = apply_windowing(hounsfield, dcmread(file))
        assert np.abs(found - dicom_window(hounsfield, center, width, function)).max() < 1e-3
    low, high = -1024, 65535 - 1024  # pydicom's range: that of the stored bits, rescaled
    assert np.abs(found - (reference - low) / (high - low) * 255).max() < 1e-3
    if function == "LINEAR":
        assert np.array_equal(found, decode_dicom(file, (center, width))[0])


def lut(table: np.ndarray, first: int, bits: int) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(table) % 65536, first, bits])
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    return Sequence([item])


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_voi_lut_wins_over_the_window_and_is_scaled_by_its_bits(
    tmp_path: Path, bits: int, kind: str
) -> None:
    # 4,096 entries, also of 8 bits: their number does not fit the type of their values.
    top = 2**bits - 1
    table = np.rint(np.linspace(0, 1, 4096) ** 3 * top)
    stored = np.rint(RAMP * 4095).astype(np.uint16)
    file = tmp_path / "x.dcm"
    window = {"WindowCenter": 40, "WindowWidth": 400, "PhotometricInterpretation": kind}
    write_dicom(file, stored, VOILUTSequence=lut(table, 0, bits), **window)
    expected = table[stored] * 255 / top
    expected = 255 - expected if kind == "MONOCHROME1" else expected
    assert np.abs(decode_dicom(file)[0].numpy() - expected).max() < 1e-3
    if bits > 8:  # where pydicom's own function counts right
        assert np.array_equal(apply_voi_lut(stored, dcmread(file)), table[stored])
    own = dicom_window(stored, 100, 300)
    own = 255 - own if kind == "MONOCHROME1" else own
    assert np.abs(decode_dicom(file, (100, 300))[0].numpy() - own).max() < 1e-3


def test_voi_lut_of_rescaled_values_may_begin_below_zero(tmp_path: Path) -> None:
    table = np.rint(np.linspace(0, 255, 1024))
    voi = lut(table, 0, 8)
    voi[0].add_new("LUTDescriptor", "US", [1024, 65536 - 1000, 8])  # -1000, as unsigned 16 bits
    write_dicom(tmp_path / "x.dcm", HOUNSFIELD, **RESCALED, VOILUTSequence=voi)
    # -1024 lies before the first entry, -200 is the 800th, 40 and 3071 lie behind the last.
    assert decode_dicom(tmp_path / "x.dcm").flatten().tolist() == [0, table[800], 255, 255]


def test_modality_lut_of_any_depth_comes_before_the_window(tmp_path: Path) -> None:
    modality = lut(np.array([0, 100, 3000, 4000]), 10, 12)
    window = {"WindowCenter": 2000, "WindowWidth": 4001}
    write_dicom(
        tmp_path / "x.dcm",
        np.array([[9, 11], [12, 99]], np.uint8),
        ModalityLUTSequence=modality,
        **window,
    )
    expected = dicom_window(np.array([0.0, 100, 3000, 4000]), 2000, 4001)
    assert decode_dicom(tmp_path / "x.dcm").flatten().tolist() == pytest.approx(expected)


def group(**items: dict[str, object]) -> Sequence:
    """A functional group; each of the items is a sequence of one data set."""
    outer = Dataset()
    for name, elements in items.items():
        inner = Dataset()
        for keyword, value in elements.items():
            setattr(inner, keyword, value)
        setattr(outer, name, Sequence([inner]))
    return Sequence([outer])


def test_enhanced_file_of_one_frame_is_read_by_its_functional_groups(tmp_path: Path) -> None:
    shared = group(
        PixelValueTransformationSequence=RESCALED,
        FrameVOILUTSequence={"WindowCenter": 1, "WindowWidth": 2},
    )
    frame = group(FrameVOILUTSequence={"WindowCenter": 0, "WindowWidth": 400})
    groups = {
        "NumberOfFrames": 1,
        "SharedFunctionalGroupsSequence": shared,
        "PerFrameFunctionalGroupsSequence": frame,
    }
    write_dicom(tmp_path / "x.dcm", HOUNSFIELD, **groups)
    expected = dicom_window(np.array([-1024, -200, 40, 3071]), 0, 400)
    assert decode_dicom(tmp_path / "x.dcm").flatten().tolist() == pytest.approx(expected)
    spaced = group(PixelMeasuresSequence={"PixelSpacing": [2, 1]})
    write_dicom(tmp_path / "y.dcm", HOUNSFIELD, SharedFunctionalGroupsSequence=spaced)
    assert decode_dicom(tmp_path / "y.dcm").shape == (1, 4, 2)
    colored = group(CTImageFrameTypeSequence={"PixelPresentation": "MIXED"})
    write_dicom(tmp_path / "z.dcm", HOUNSFIELD, PerFrameFunctionalGroupsSequence=colored)
    with pytest.raises(ValueError, match="PixelPresentation must be MONOCHROME, got 'MIXED'"):
        decode_dicom(tmp_path / "z.dcm")


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_no_part_of_the_range(tmp_path: Path, kind: str) -> None:
    values = np.array([[-2000, -1990], [0, 100]], np.int16)
    padding = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}
    write_dicom(tmp_path / "x.dcm", values, PhotometricInterpretation=kind, **padding)
    shown = [255, 0] if kind == "MONOCHROME1" else [0, 255]
    assert decode_dicom(tmp_path / "x.dcm").flatten().tolist() == pytest.approx([0, 0, *shown])
    # The same bits in a file without sign, whose writer had a signed value in mind.
    write_dicom(tmp_path / "y.dcm", values.view(np.uint16), PhotometricInterpretation=kind)
    file = dcmread(tmp_path / "y.dcm")
    file.add_new("PixelPaddingValue", "US", 65536 - 2000)
    file.add_new("PixelPaddingRangeLimit", "US", 65536 - 1990)
    file.save_as(tmp_path / "y.dcm")
    assert decode_dicom(tmp_path / "y.dcm").flatten().tolist() == pytest.approx([0, 0, *shown])


def test_padding_beyond_the_bits_stored_is_no_value(tmp_path: Path) -> None:
    values = np.array([[0xF830, 0x0830], [0, 4095]], np.uint16)  # -2000, and 2096 of the same bits
    write_dicom(tmp_path / "x.dcm", values, BitsStored=12, HighBit=11, PixelPaddingValue=0xF830)
    expected = [0, 2096 / 4095 * 255, 0, 255]
    assert decode_dicom(tmp_path / "x.dcm").flatten().tolist() == pytest.approx(expected)


def test_bits_above_those_stored_are_no_part_of_the_value(tmp_path: Path) -> None:
    twelve = {"BitsStored": 12, "HighBit": 11}
    overlay = np.array([[0x8000, 0x1000 + 4095], [2048, 0x4000 + 1024]], np.uint16)
    write_dicom(tmp_path / "x.dcm", overlay, **twelve, WindowCenter=2048, WindowWidth=4096)
    expected = [0, 255, 2048 / 4095 * 255, 1024 / 4095 * 255]
    assert decode_dicom(tmp_path / "x.dcm").flatten().tolist() == pytest.approx(expected, abs=0.1)
    signed = np.array([[0x0FFF, 0x0800], [0x07FF, -1]], np.int16)  # -1, -2048, 2047, -1
    write_dicom(tmp_path / "y.dcm", signed, **twelve)
    expected = [2047 / 4095 * 255, 0, 255, 2047 / 4095 * 255]
    assert decode_dicom(tmp_path / "y.dcm").flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("elements", "height", "width"),
    [
        ({"PixelSpacing": [3, 1]}, 6, 2),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.5, 1]}, 2, 4),
        ({"PixelAspectRatio": [1, 2]}, 2, 4),
        ({"PixelSpacing": [0.7, 0.7], "PixelAspectRatio": [1, 2]}, 2, 2),
    ],
)
def test_pixels_become_square(
    tmp_path: Path, elements: dict[str, object], height: int, width: int
) -> None:
    write_dicom(tmp_path / "x.dcm", HOUNSFIELD, **elements)
    found = decode_dicom(tmp_path / "x.dcm")
    assert found.shape == (1, height, width)
    assert found[0, 0, 0] == 0 and found[0, -1, -1] == 255


COLOR = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


def palette_elements(table: np.ndarray, bits: int) -> dict[str, object]:
    return {
        f"{name}PaletteColorLookupTable{part}": value
        for i, name in enumerate(("Red", "Green", "Blue"))
        for part, value in (
            ("Descriptor", [len(table), 0, bits]),
            ("Data", table[:, i].astype("u1" if bits == 8 else "<u2").tobytes()),
        )
    }


def test_colors_of_every_kind_become_rgb(tmp_path: Path) -> None:
    pixels, file = picture(0), tmp_path / "x.dcm"
    expected = pixels.transpose(2, 0, 1)
    write_dicom(file, pixels, **COLOR)
    assert np.array_equal(decode_dicom(file), expected)
    planes = np.ascontiguousarray(expected).reshape(8, 8, 3)  # the same bytes, plane after plane
    write_dicom(file, planes, **COLOR | {"PlanarConfiguration": 1})
    assert np.array_equal(decode_dicom(file), expected)
    write_dicom(file, pixels.astype(np.uint16) * 257, **COLOR)
    assert np.abs(decode_dicom(file).numpy() - expected).max() < 1e-3
    ybr = convert_color_space(pixels, "RGB", "YBR_FULL")
    write_dicom(file, ybr, **COLOR | {"PhotometricInterpretation": "YBR_FULL"})
    assert np.abs(decode_dicom(file).numpy() - expected).max() <= 2
    table, chosen = picture(1).reshape(-1, 3), picture(2, channels=1) % 64
    for bits, factor in ((8, 1), (16, 257)):
        elements = palette_elements(table.astype(int) * factor, bits)
        write_dicom(file, chosen, PhotometricInterpretation="PALETTE COLOR", **elements)
        assert np.abs(decode_dicom(file).numpy() - table[chosen].transpose(2, 0, 1)).max() < 1e-3


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"WindowCenter": 40, "WindowWidth": 0.5}, "WindowWidth must be >= 1 with LINEAR"),
        (
            {"WindowCenter": 40, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
            "WindowWidth must be > 0",
        ),
        ({"WindowCenter": 4, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "'CUBIC'"),
        ({"WindowCenter": 40}, "WindowCenter and WindowWidth must be both there"),
        ({"RescaleSlope": 2}, "RescaleSlope and RescaleIntercept must be both there"),
        ({"RescaleSlope": 0, "RescaleIntercept": 1}, "the slope not 0"),
        ({"RescaleSlope": 1, "RescaleIntercept": "1E999"}, "RescaleIntercept must be finite"),
        ({"WindowCenter": ["0", "-1E999"], "WindowWidth": 9}, "WindowCenter must be finite"),
        ({"PresentationLUTShape": "INVERSE"}, "PresentationLUTShape must be IDENTITY"),
        ({"HighBit": 11, "BitsStored": 10}, "HighBit must be 9 with BitsStored 10"),
        ({"NumberOfFrames": 2}, "it has 2 frames"),
        ({"PixelSpacing": [50, 1]}, "at most 10 times"),
        ({"PhotometricInterpretation": "HSV"}, "PhotometricInterpretation must be MONOCHROME1"),
        ({"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 4095}, "every pixel is padding"),
        ({"VOILUTSequence": lut(np.array([0, 300]), 0, 8)}, "table of values up to 255, got .*300"),
    ],
)
def test_what_is_not_read_is_refused_with_the_element(
    tmp_path: Path, elements: dict[str, object], reason: str
) -> None:
    write_dicom(tmp_path / "x.dcm", HOUNSFIELD, **elements)
    with pytest.raises(ValueError, match=reason):
        decode_dicom(tmp_path / "x.dcm")


def test_empty_elements_say_nothing(tmp_path: Path) -> None:
    names = ("WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleSlope", "PixelSpacing")
    write_dicom(tmp_path / "x.dcm", HOUNSFIELD, **dict.fromkeys(names))
    write_dicom(tmp_path / "y.dcm", HOUNSFIELD)
    assert torch.equal(decode_dicom(tmp_path / "x.dcm"), decode_dicom(tmp_path / "y.dcm"))


def test_missing_decoders_are_answered_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dicom(tmp_path / "x.dcm", HOUNSFIELD)
    file = dcmread(tmp_path / "x.dcm")
    file.file_meta.TransferSyntaxUID = JPEGLossless
    file.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    file["PixelData"].VR = "OB"
    file.save_as(tmp_path / "x.dcm")
    monkeypatch.setattr(get_decoder(JPEGLossless), "_available", {})
    with pytest.raises(ValueError, match=r"JPEG Lossless.*uv sync --extra dicom.*feddm\[dicom\]"):
        decode_dicom(tmp_path / "x.dcm")


PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
# Those of pydicom's own files that are no image of one frame, or damaged on purpose.
REFUSED = {
    **dict.fromkeys(
        [
            *("UN_sequence", "empty_charset_LEI", "no_meta_group_length", "priv_SQ", "reportsi"),
            *("reportsi_with_empty_number_tags", "rtplan", "rtplan_truncated", "test-SR"),
            "waveform_ecg",
        ],
        "it holds no image",
    ),
    **dict.fromkeys(
        ["ExplVR_BigEndNoMeta", "ExplVR_LitEndNoMeta", "no_meta", "rtstruct"], "'DICM'"
    ),
    **dict.fromkeys(["SC_rgb_rle_16bit_2frame", "SC_rgb_rle_2frame"], "it has 2 frames"),
    **dict.fromkeys(["rtdose", "rtdose_expb", "rtdose_rle"], "it has 15 frames"),
    **{"SC_rgb_rle_32bit_2frame": "it has 2 frames", "examples_ybr_color": "it has 30 frames"},
    **{"badVR": "it has 1A frames", "MR_truncated": "number of bytes of pixel data"},
    **dict.fromkeys(["JPEG-lossy", "JPGExtended"], "12-bit"),
    **{"JPEG2000-embedded-sequence-delimiter": "Unable to decode"},
    **{"meta_missing_tsyntax": "TransferSyntaxUID", "nested_priv_SQ": "BitsStored"},
}


@pytest.mark.parametrize("file", sorted(PYDICOM_FILES.glob("*.dcm")), ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_of_pydicom_are_read_as_it_reads_them_or_refused(file: Path) -> None:
    if file.stem in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[file.stem]) as caught:
            decode_dicom(file)
        assert "\n" not in str(caught.value)
        return
    dataset = dcmread(file)
    if not get_decoder(dataset.file_meta.TransferSyntaxUID).is_available or "TextGBR" in file.stem:
        pytest.importorskip("gdcm", reason="uv sync --extra dicom")
    found = decode_dicom(file).numpy()
    if len(found) == 3:
        if dataset.PhotometricInterpretation != "PALETTE COLOR":
            colors = dataset.pixel_array * (255 / (2**dataset.BitsStored - 1))
            assert np.abs(found - colors.transpose(2, 0, 1)).max() < 0.01
        return
    values = apply_modality_lut(dataset.pixel_array, dataset).astype(np.float64)
    shown = apply_voi_lut(values, dataset)
    # Whatever the range of pydicom's result, it is a straight line from ours.
    seen = values != dataset.get("PixelPaddingValue")
    slope, offset = np.polyfit(shown[seen], found[0][seen], 1)
    assert np.abs(shown * slope + offset - found[0])[seen].max() < 0.01
    assert found.max() > 250 and slope > 0


def test_configured_window_wins_over_that_of_the_file(tmp_path: Path) -> None:
    write_dicom(tmp_path / "x.dcm", HOUNSFIELD, **RESCALED, WindowCenter=0, WindowWidth=10)
    found = decode_dicom(tmp_path / "x.dcm", (39.5, 481))
    assert found.shape == (1, 2, 2)
    # (v - c + 0.5) / (w - 1) + 0.5: 0 below -201, 1 above 279
    assert found.flatten().tolist() == pytest.approx([0, 255 / 480, 255 * 241 / 480, 255])


def test_files_without_window_are_stretched_and_monochrome1_is_inverted(tmp_path: Path) -> None:
    values = np.array([[-100, 0], [100, 410]], dtype=np.int16)
    write_dicom(tmp_path / "x.dcm", values)
    assert decode_dicom(tmp_path / "x.dcm").flatten().tolist() == pytest.approx([0, 50, 100, 255])
    write_dicom(tmp_path / "y.dcm", values, PhotometricInterpretation="MONOCHROME1")
    inverted = decode_dicom(tmp_path / "y.dcm")
    assert inverted.flatten().tolist() == pytest.approx([255, 205, 155, 0])
    write_dicom(tmp_path / "flat.dcm", np.full((2, 2), 7, np.uint8))
    assert decode_dicom(tmp_path / "flat.dcm").unique().tolist() == [0]

"""Image files of every kind, written by code."""

import struct
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

HOUNSFIELD = np.array([[0, 824], [1064, 4095]], dtype=np.uint16)  # -1024, -200, 40, 3071 HU
RESCALED = {"RescaleSlope": 1, "RescaleIntercept": -1024}


def picture(seed: int, size: int = 8, channels: int = 3) -> np.ndarray:
    shape = (size, size) if channels == 1 else (size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_dicom(path: Path, values: np.ndarray, **elements: object) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    bits = values.dtype.itemsize * 8
    file.Rows, file.Columns = (
        values.shape[:2] if elements.get("SamplesPerPixel") else (values.shape[-2:])
    )
    file.SamplesPerPixel = 1
    file.PhotometricInterpretation = "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = bits
    file.HighBit = bits - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in elements.items():
        setattr(file, name, value)
    file.PixelData = values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def write_tiff(path: Path, data: bytes, size: tuple[int, int], tags: dict[int, list[int]]) -> None:
    """Write a little-endian TIFF file of one strip, or of one per plane, as no library would.

    Args:
        path: of the file.
        data: uncompressed, plane after plane.
        size: width and height.
        tags: further fields, 16 bits each, by number; 258 (BitsPerSample) and 262 among them.
    """
    planes = len(tags[258]) if tags.get(284) == [2] else 1
    share = len(data) // planes
    fields = {256: [size[0]], 257: [size[1]], 259: [1], 277: [len(tags[258])], 278: [size[1]]}
    fields |= {273: [0] * planes, 279: [share] * planes} | tags
    end = 8 + 2 + 12 * len(fields) + 4
    kinds = {tag: "I" if tag in (273, 279) else "H" for tag in fields}
    lengths = {tag: struct.calcsize(f"<{len(v)}{kinds[tag]}") for tag, v in fields.items()}
    start = end + sum(length for length in lengths.values() if length > 4)
    fields[273] = [start + share * i for i in range(planes)]
    entries, outside = b"", b""
    for tag, values in sorted(fields.items()):
        packed = struct.pack(f"<{len(values)}{kinds[tag]}", *values)
        kind = 4 if kinds[tag] == "I" else 3
        entries += struct.pack("<HHI", tag, kind, len(values))
        entries += (
            packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", end + len(outside))
        )
        outside += packed if len(packed) > 4 else b""
    header = b"II*\0" + struct.pack("<IH", 8, len(fields))
    path.write_bytes(header + entries + b"\0" * 4 + outside + data)

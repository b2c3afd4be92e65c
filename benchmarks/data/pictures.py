"""From the bytes of one image file to its pixels, and what was done to get them.

Pillow decodes. Other information in the file is used, refused or reported; docs/data.md has the
table. As a script, this decodes what ``decoders`` sends to it; so it imports nothing of ours.
"""

import io
import json
import struct
import sys
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

ORIENTATION = 0x0112
PHOTOMETRIC, BITS, EXTRA_SAMPLES, SAMPLE_FORMAT = 262, 258, 338, 339  # tags of a TIFF
SRGB = (b"sRGB", "sRGB".encode("utf-16-be"))
"""Bytes in the name of a colour profile that mean sRGB."""
SRGB_GAMMA = 0.45455
DEEP = (";16B", ";16L", ";16N")
"""Endings of Pillow's names for channels of 16 bits ("BGR;16" is 16 bits a pixel)."""
ADVICE = "convert it to 8 bits, or put values scaled to [0, 1] into an npz file"
FULL_RANGE = 1 << 15
"""If the highest of 16 bits is never set, they may be 10, 12 or 15 bits at an unknown position."""
NOT_READ = (  # offset, bytes, and what a file is that has them there
    (128, b"DICM", "a DICOM file"),
    (4, b"ftyphei", "a HEIC image"),
    (4, b"ftyphev", "a HEIC image"),
    (4, b"ftypmif1", "a HEIF image"),
    (4, b"ftypmsf1", "a HEIF image"),
    (344, b"n+1\0", "a NIfTI file"),
    (0, b"\x93NUMPY", "a numpy array"),
    (0, b"PK\x03\x04", "a zip archive or npz file"),
    (0, b"\x1f\x8b", "a gzip file (.nii.gz?)"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"NRRD", "an NRRD file"),
    (0, b"%PDF", "a PDF file"),
    (0, b"SIMPLE  =", "a FITS file"),
)
DONE = {
    "turned": "turned as their orientation tag says",
    "ground": "with transparency composited on black",
    "clear": "fully transparent, so black",
    "pages": "of several pages or frames, of which the first is used",
    "deep": "of more than 8 bits per channel reduced to 8",
    "white is zero": "in which 0 is white inverted",
    "cmyk": "converted from CMYK to RGB without a colour profile",
    "profile": "with a colour profile or gamma other than that of sRGB, which is not applied",
    "extra": "with channels beyond colour and transparency, which are left out",
    "squeezed": "that are not square squeezed to a square",
}
"""Notes on some of the images, in the order in which they are printed."""
HEAD = struct.Struct("<IQ")
"""Before the bytes of each file sent to a process: the edge in pixels, and their number."""
ALTERED = ("turned", "ground", "white is zero", "12 bits")
"""Changes that earlier versions did not make: part of a folder's checksum."""


class NotAnImage(ValueError):
    """Bytes in an unknown format; the message says what they seem to be, or is empty."""


class Refused(ValueError):
    """An image whose values cannot be used; the message says why, and what to do."""


class Picture(NamedTuple):
    """One image as it is used."""

    pixels: np.ndarray
    """uint8, (size, size) if it is grey, else (size, size, 3)"""
    done: frozenset[str]
    """keys of DONE, and others of ALTERED"""
    peak: int | None
    """the largest of its 16-bit values, for colours in steps of 256; None if the format declares
    their range"""
    warned: str
    """the reader's warning, or empty"""


def decode(data: bytes, size: int) -> Picture:
    """The image in the bytes of a file: turned upright, on black, 8 bits, resized.

    Raises ValueError for a damaged image, or its subclasses Refused and NotAnImage.
    """
    if not data:
        raise ValueError("it is empty, 0 bytes")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A very large image is resized like any other; Pillow refuses dangerously large ones.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data)) as image:
                pixels, done, peak = _decoded(image, size)
        except UnidentifiedImageError as error:
            raise NotAnImage(_what(data)) from error
        except Refused:
            raise
        # For damaged bytes, Pillow's readers may raise nearly anything.
        except Exception as error:
            raise ValueError(str(error) or type(error).__name__) from error
    return Picture(pixels, frozenset(done), peak, str(caught[0].message) if caught else "")


def told(counts: dict[str, int]) -> list[str]:
    """A note for each thing that was done to some images, with their number."""
    return [
        f"{counts[key]} image{'s' * (counts[key] > 1)} {text}"
        for key, text in DONE.items()
        if counts.get(key)
    ]


def _what(data: bytes) -> str:
    for offset, magic, what in NOT_READ:
        if data[offset : offset + len(magic)] == magic:
            return what
    return ""


def _decoded(image: Image.Image, size: int) -> tuple[np.ndarray, set[str], int | None]:
    animated = getattr(image, "is_animated", False)  # a format of one page has no such attribute
    raw, declared = _stored(image)
    tags = dict(image.tag_v2) if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    image.load()
    _refuse(image, tags)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    done = {"pages"} if animated else set()
    if _is_turned(image):
        image = ImageOps.exif_transpose(image)
        done.add("turned")
    done |= _remarks(image, tags)
    peak = None
    if image.mode == "I" or image.mode.startswith("I;16"):
        image, peak, altered = _shallow(image, tags)
        done |= altered
    elif raw.endswith(DEEP):
        peak = _peak_of_colours(image)
        done.add("deep")
    picture, ground = _on_black(image, raw)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    return pixels, done | ground, None if declared else peak


def _remarks(image: Image.Image, tags: dict) -> set[str]:
    """Remarks on the image and the other information in its file."""
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma", SRGB_GAMMA)
    other_profile = profile and not any(name in profile for name in SRGB)
    told = {
        "squeezed": image.width != image.height,
        "cmyk": image.mode == "CMYK",
        "extra": 0 in tags.get(EXTRA_SAMPLES, ()),
        "profile": other_profile or abs(gamma - SRGB_GAMMA) > 0.01,
    }
    return {key for key, holds in told.items() if holds}


def _shallow(image: Image.Image, tags: dict) -> tuple[Image.Image, int | None, set[str]]:
    """Grey of 12 or 16 bits reduced to 8, its largest 16-bit value, and what was done."""
    done = {"deep"}
    deep = np.asarray(image)
    bits = 12 if tags.get(BITS) == (12,) else 16
    peak = int(deep.max()) if bits == 16 else None
    clear = deep == image.info.get("transparency", -1)
    if tags.get(PHOTOMETRIC) == 0:
        deep = 2**bits - 1 - deep
        done.add("white is zero")
    if bits == 12:
        done.add("12 bits")
    # Pillow clips 16 bits to 255 where it should scale them.
    shallow = (deep >> (bits - 8)).astype(np.uint8)
    if clear.any():
        shallow[clear] = 0
        done |= {"ground", "clear"} if clear.all() else {"ground"}
    return Image.fromarray(shallow), peak, done


def _peak_of_colours(image: Image.Image) -> int:
    """The largest value of 16-bit colours, of which Pillow returns only the high byte."""
    if "transparency" in image.info:
        raise Refused(f"one of its 16-bit colours is transparent; {ADVICE}")
    bands = np.asarray(image)
    colours = bands[..., :-1] if image.mode in ("LA", "RGBA") else bands
    return int(colours.max()) << 8


def _on_black(image: Image.Image, raw: str) -> tuple[Image.Image, set[str]]:
    """The image, grey or in colour, composited on black, and whether any of it is transparent."""
    mode = "L" if image.mode in ("L", "LA", "1") else "RGB"
    alpha = _alpha(image, raw)
    picture = _plain(image, mode)
    if alpha is None:
        return picture, set()
    low, high = alpha.getextrema()
    if low == 255:
        return picture, set()
    # Pixels hidden by transparency are never seen, so they must not matter.
    picture = Image.composite(picture, Image.new(mode, picture.size), alpha)
    return picture, {"ground", "clear"} if high == 0 else {"ground"}


def _stored(image: Image.Image) -> tuple[str, bool]:
    """Pillow's name for the pixel format of the file, and whether it declares the range."""
    tiles = getattr(image, "tile", None)  # some readers have none
    if not tiles:
        return "", False
    codec, _, _, arguments = tiles[0]
    if codec in ("ppm", "ppm_plain"):
        raw, most = arguments
        # If the largest value is given as 65535, the writer may not have known it.
        return (raw if most < 256 else f"{raw};16B"), most < 65535
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return (first if isinstance(first, str) else ""), image.format == "JPEG2000"


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    # Damaged EXIF data may raise nearly anything, too; the pixels may be intact.
    except Exception as error:
        warnings.warn(f"EXIF data that cannot be read: {error}", stacklevel=2)
        return False


def _refuse(image: Image.Image, tags: dict) -> None:
    """Refuse values of unknown range."""
    if 2 in tags.get(SAMPLE_FORMAT, ()):
        bits = tags.get(BITS, (8,))[0]
        raise Refused(f"it contains signed {bits}-bit integers of unknown range; {ADVICE}")
    if image.mode == "F":
        raise Refused(f"it contains floats of unknown range; {ADVICE}")
    if image.mode == "I" and image.format != "PPM":
        raise Refused(f"it contains 32-bit integers of unknown range; {ADVICE}")
    if image.format == "FITS":
        raise Refused(f"it is a FITS file, whose values have no known range; {ADVICE}")


def _alpha(image: Image.Image, raw: str) -> Image.Image | None:
    """The opacity of each pixel, mode L; None if all are opaque."""
    if image.mode in ("LA", "PA", "RGBA"):
        return image.getchannel("A")
    if "transparency" not in image.info or image.mode not in ("1", "L", "P", "RGB"):
        return None
    if raw in ("L;2", "L;4"):  # the grey that is transparent has the depth of the file
        clear = image.info["transparency"] * {"L;2": 85, "L;4": 17}[raw]
        return image.point([0 if grey == clear else 255 for grey in range(256)])
    return image.convert("RGBA").getchannel("A")


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """The image in this mode, ignoring transparency."""
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # avoids a warning of Pillow
    return image.convert(mode)


def _serve() -> None:
    """Decode files until there are none: of each a line of JSON, and its pixels."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(HEAD.size):
        size, length = HEAD.unpack(head)
        try:
            found = decode(source.read(length), size)
        except ValueError as error:
            told, pixels = {"error": type(error).__name__, "text": str(error)}, b""
        else:
            pixels = found.pixels.tobytes()
            told = found._asdict() | {"pixels": None, "shape": found.pixels.shape}
            told["done"] = sorted(found.done)
        target.write(json.dumps(told).encode() + b"\n" + pixels)
        target.flush()


if __name__ == "__main__":
    _serve()

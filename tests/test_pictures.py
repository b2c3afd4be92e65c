"""What is made of one image file: each thing that a format can say, with the right pixels."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from benchmarks.data.pictures import (
    NotAnImage,
    Picture,
    Refused,
    decode,
    told,
)

LEFT = np.array([[0, 50], [100, 255]], np.uint8)
"""An image of which every turn is another."""


def encoded(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(
    width: int, depth: int, colour: int, row: bytes, *more: tuple[bytes, bytes], height: int = 1
) -> bytes:
    """A PNG file whose rows all hold the bytes `row`."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", zlib.compress((b"\0" + row) * height))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


def tiff(
    array: np.ndarray, bits: int, sample: int = 1, white: int = 1, width: int | None = None
) -> bytes:
    """A baseline TIFF of one strip: SampleFormat, and PhotometricInterpretation 0 or 1."""
    data = array.tobytes()
    height = len(array)
    width = width or array.shape[1]
    tags = [
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, bits), (259, 3, 1, 1)),
        *((262, 3, 1, white), (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, height)),
        *((279, 4, 1, len(data)), (339, 3, 1, sample)),
    ]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + ifd + struct.pack("<I", 0)


def pixels(data: bytes, size: int = 2) -> np.ndarray:
    return decode(data, size).pixels


# ---------------------------------------------------------------- orientation

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].T,
    8: np.rot90,
}


@pytest.mark.parametrize("tag", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_image_is_turned_as_its_orientation_tag_says(tag: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    blocks = np.kron(LEFT, np.ones((8, 8), np.uint8))
    how = {"TIFF": {}, "PNG": {}, "JPEG": {"quality": 100}, "WEBP": {"lossless": True}}[kind]
    picture = decode(encoded(Image.fromarray(blocks), kind, exif=exif, **how), 16)
    grey = picture.pixels if picture.pixels.ndim == 2 else picture.pixels[..., 0]
    assert np.abs(grey.astype(int) - TURNS[tag](blocks)).max() <= 1
    # Pillow itself has always turned a TIFF: nothing new is to be told of it.
    assert ("turned" in picture.done) == (tag != 1 and kind != "TIFF")


def test_damaged_exif_data_do_not_cost_the_pixels() -> None:
    data = encoded(Image.fromarray(LEFT), exif=b"Exif\0\0no such thing")
    picture = decode(data, 2)
    assert np.array_equal(picture.pixels, LEFT) and "EXIF" in picture.warned
    assert decode(encoded(Image.fromarray(LEFT)), 2).warned == ""


# ---------------------------------------------------------------- transparency


def layered(mode: str, hidden: int) -> Image.Image:
    """Left clear over `hidden`, in the middle half clear over 200, right opaque 100."""
    grey = np.array([[hidden, 200, 100]] * 3, np.uint8)
    alpha = np.array([[0, 128, 255]] * 3, np.uint8)
    bands = [Image.fromarray(grey)] * (1 if mode == "LA" else 3)
    return Image.merge(mode, [*bands, Image.fromarray(alpha)])


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparency_is_composited_on_black(mode: str, kind: str) -> None:
    dark, light = (decode(encoded(layered(mode, h), kind), 3) for h in (0, 255))
    row = [0, 100, 100]  # 200 * 128 / 255 is 100.4
    assert np.array_equal(dark.pixels, light.pixels) and dark.done == light.done == {"ground"}
    assert (dark.pixels[0] == np.array(row if mode == "LA" else [[v] * 3 for v in row])).all()


def test_what_is_opaque_is_as_without_transparency() -> None:
    colour = Image.fromarray(np.arange(27, dtype=np.uint8).reshape(3, 3, 3))
    for image in (colour, colour.convert("L")):
        more = image.copy()
        more.putalpha(255)
        picture = decode(encoded(more), 3)
        assert np.array_equal(picture.pixels, np.asarray(image)) and picture.done == frozenset()


def test_resizing_brings_nothing_back_from_under_transparency() -> None:
    alpha = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((8, 8), np.uint8)))
    made = []
    for hidden in (0, 255):
        image = Image.new("L", (16, 16), hidden)
        image.paste(128, mask=alpha)
        image.putalpha(alpha)
        made.append(pixels(encoded(image), 5))
    assert np.array_equal(*made) and made[0].max() == 128


@pytest.mark.parametrize(
    ("data", "row"),
    [
        (png(2, 1, 0, b"\x40", (b"tRNS", b"\0\1")), [0, 0]),
        (png(2, 2, 0, b"\xd0", (b"tRNS", b"\0\3")), [0, 85]),
        (png(2, 4, 0, b"\x3f", (b"tRNS", b"\0\x0f")), [51, 0]),
        (png(2, 8, 0, b"\x07\x63", (b"tRNS", b"\0\x07")), [0, 0x63]),
        (png(2, 16, 0, b"\xff\xfe\xff\xff", (b"tRNS", b"\xff\xfe")), [0, 255]),
        (png(2, 8, 2, b"\1\2\3\1\2\4", (b"tRNS", b"\0\1\0\2\0\3")), [[0, 0, 0], [1, 2, 4]]),
        (
            png(2, 8, 3, b"\0\1", (b"PLTE", b"\7\7\7\x63\x63\x63"), (b"tRNS", b"\0")),
            [[0, 0, 0], [0x63] * 3],
        ),
        (
            png(2, 8, 3, b"\0\1", (b"PLTE", b"\xc8\xc8\xc8\x63\x63\x63"), (b"tRNS", b"\x80")),
            [[100] * 3, [0x63] * 3],
        ),
    ],
    ids=["1 bit", "2 bits", "4 bits", "8 bits", "16 bits", "RGB", "palette", "half palette"],
)
def test_one_transparent_colour_is_black(data: bytes, row: list) -> None:
    picture = decode(data, 2)
    assert picture.pixels[0].tolist() == row and "ground" in picture.done and not picture.warned


def test_an_image_that_is_clear_all_over_is_told() -> None:
    picture = decode(encoded(Image.new("RGBA", (2, 2), (200, 100, 50, 0))), 2)
    assert not picture.pixels.any() and picture.done == {"ground", "clear"}


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    with pytest.raises(Refused, match="16-bit colours is transparent; convert it to 8 bits"):
        decode(png(1, 16, 2, b"\0\1\0\2\0\3", (b"tRNS", b"\0\1\0\2\0\3")), 2)


# ---------------------------------------------------------------- depth and range


def test_a_palette_gives_colours_also_where_they_are_grey() -> None:
    image = Image.fromarray(LEFT).convert("P")
    assert np.array_equal(pixels(encoded(image)), np.repeat(LEFT[..., None], 3, -1))


def test_one_bit_is_black_and_white() -> None:
    image = Image.fromarray(LEFT).convert("1", dither=Image.Dither.NONE)
    for kind in ("PNG", "TIFF", "BMP"):
        picture = decode(encoded(image, kind), 2)
        assert np.array_equal(picture.pixels, [[0, 0], [0, 255]]) and not picture.done


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_eight_and_say_how_far_they_reach(kind: str) -> None:
    deep = np.array([[0, 255], [256, 40000]], np.uint16)
    picture = decode(encoded(Image.fromarray(deep), kind), 2)
    assert np.array_equal(picture.pixels, [[0, 0], [1, 156]])
    assert picture.peak == 40000 and picture.done == {"deep"}


def test_colours_of_sixteen_bits_are_deep_too() -> None:
    picture = decode(png(2, 16, 2, b"\x0f\xff\1\1\2\2\3\3\4\4\5\5", height=2), 2)
    assert picture.pixels[0].tolist() == [[15, 1, 2], [3, 4, 5]]
    assert picture.peak == 15 << 8 and picture.done == {"deep"}
    with_alpha = decode(png(1, 16, 6, b"\x0f\xff\1\1\2\2\xff\xff"), 1)
    assert with_alpha.peak == 15 << 8 and with_alpha.done == {"deep"}


def test_sixteen_bits_a_pixel_are_not_deep() -> None:
    head = struct.pack("<IiiHHIIiiII", 40, 1, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    offset = 14 + len(head) + len(masks)
    data = struct.pack("<2sIHHI", b"BM", offset + 4, 0, 0, offset) + head + masks + b"\0\xf8\0\0"
    picture = decode(data, 1)
    assert picture.pixels.tolist() == [[[255, 0, 0]]] and not picture.done and picture.peak is None


def test_a_range_that_the_format_declares_is_used() -> None:
    packed = np.array([[0x00, 0x0F, 0xFF], [0x80, 0x00, 0x10]], np.uint8)  # 12 bits a pixel
    picture = decode(tiff(packed, 12, width=2), 2)
    assert np.array_equal(picture.pixels, [[0, 255], [128, 1]])
    assert picture.peak is None and picture.done == {"deep", "12 bits"}
    grey = decode(b"P5 2 2 4095\n" + b"\x00\x00\x0f\xff\x08\x00\x00\x10", 2)
    assert np.array_equal(grey.pixels, [[0, 255], [128, 1]]) and grey.peak is None
    colour = decode(b"P6 1 1 4095\n" + b"\x0f\xff\x08\x00\x00\x10", 1)
    assert colour.pixels.tolist() == [[[255, 128, 1]]] and colour.peak is None
    unknown = decode(b"P5 2 1 65535\n" + b"\x00\x00\x0f\xff", 2)
    assert unknown.peak == 4095
    assert decode(b"P6 1 1 65535\n" + b"\x0f\xff\x08\x00\x00\x10", 1).peak == 16 << 8


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (tiff(np.array([[-950, 30]], "<i2"), 16, sample=2), "signed 16-bit integers"),
        (tiff(np.array([[5, 30]], "<i2"), 16, sample=2), "signed 16-bit integers"),
        (tiff(np.array([[-5, 30]], "i1"), 8, sample=2), "signed 8-bit integers"),
        (tiff(np.array([[-5, 30]], "<i4"), 32, sample=2), "signed 32-bit integers"),
        (tiff(np.array([[5, 2**31]], "<u4"), 32), "32-bit integers"),
        (tiff(np.array([[0.5, 1]], "<f4"), 32, sample=3), "floats"),
    ],
)
def test_values_of_unknown_range_are_refused(data: bytes, what: str) -> None:
    with pytest.raises(Refused, match=f"{what} of unknown range; convert it to 8 bits, or put"):
        decode(data, 2)


def test_where_zero_is_white_the_image_is_inverted() -> None:
    eight = decode(tiff(LEFT, 8, white=0), 2)
    assert np.array_equal(eight.pixels, 255 - LEFT) and not eight.done
    deep = decode(tiff(np.array([[0, 65535], [256, 40000]], "<u2"), 16, white=0), 2)
    assert np.array_equal(deep.pixels, [[255, 0], [254, 99]])
    assert deep.done == {"deep", "white is zero"} and deep.peak == 65535


# ---------------------------------------------------------------- colours


def test_cmyk_is_converted_and_told() -> None:
    white, cyan = Image.new("CMYK", (8, 8)), Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for kind in ("JPEG", "TIFF"):
        picture = decode(encoded(white, kind), 1)
        assert picture.pixels.tolist() == [[[255] * 3]] and picture.done == {"cmyk"}
        assert np.abs(pixels(encoded(cyan, kind), 1)[0, 0].astype(int) - [0, 255, 255]).max() <= 2


def test_other_colour_spaces_are_converted() -> None:
    rgb = Image.new("RGB", (8, 8), (200, 40, 90))
    picture = pixels(encoded(rgb.convert("YCbCr"), "TIFF"), 1)
    assert np.abs(picture[0, 0].astype(int) - [200, 40, 90]).max() <= 2
    lab = Image.new("LAB", (8, 8), (255, 128, 128))
    assert np.abs(pixels(encoded(lab, "TIFF"), 1)[0, 0].astype(int) - 255).max() <= 1


def test_a_colour_profile_or_gamma_that_is_not_applied_is_told() -> None:
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.fromarray(LEFT)
    assert decode(encoded(image, icc_profile=srgb), 2).done == frozenset()
    assert decode(encoded(image, icc_profile=lab), 2).done == {"profile"}
    for gamma, done in ((45455, set()), (100000, {"profile"})):
        data = png(2, 8, 0, b"\1\2", (b"gAMA", struct.pack(">I", gamma)), height=2)
        assert decode(data, 2).done == done


def test_channels_beyond_colour_are_told() -> None:
    image = Image.new("RGBX", (2, 2), (1, 2, 3, 4))
    picture = decode(encoded(image, "TIFF"), 1)
    assert picture.pixels.tolist() == [[[1, 2, 3]]] and picture.done == {"extra"}


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_pages_the_first_is_used_and_told(kind: str) -> None:
    first, other = (Image.new("RGB", (2, 2), (v, v, v)) for v in (255, 0))
    how = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[other], **how)
    picture = decode(data, 2)
    assert (picture.pixels == 255).all() and picture.done == {"pages"}
    assert "pages" not in decode(encoded(first, kind, **how), 2).done


def test_an_image_that_is_not_square_is_told() -> None:
    assert decode(encoded(Image.new("L", (2, 3))), 4).done == {"squeezed"}


def test_what_is_told_has_its_number() -> None:
    assert told({"turned": 12, "pages": 1, "12 bits": 3}) == [
        "12 images turned as their orientation tag says",
        "1 image of several pages or frames, of which the first is used",
    ]


def test_damaged_and_empty_files() -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)))
    jpeg = encoded(Image.new("RGB", (64, 64), (9, 99, 200)), "JPEG", progressive=True)
    for data in (whole[:-200], jpeg[:-20]):
        with pytest.raises(ValueError, match="truncated"):
            decode(data, 2)
    with pytest.raises(NotAnImage):
        decode(whole[:30], 2)
    with pytest.raises(ValueError, match="it is empty, 0 bytes"):
        decode(b"", 2)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (bytes(128) + b"DICM", "a DICOM file"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC image"),
        (bytes(344) + b"n+1\0", "a NIfTI file"),
        (b"\x93NUMPY\1\0", "a numpy array"),
        (b"PK\3\4", "a zip archive"),
        (b"some text", ""),
    ],
)
def test_what_is_no_image_is_named(data: bytes, what: str) -> None:
    with pytest.raises(NotAnImage) as caught:
        decode(data, 2)
    assert str(caught.value).startswith(what) and bool(str(caught.value)) == bool(what)


def test_damage_anywhere_is_an_error_or_an_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (9, 9, 3), np.uint8))
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        whole = np.frombuffer(encoded(image, kind, exif=exif), np.uint8)
        for _ in range(150):
            data = whole.copy()
            where = generator.integers(0, min(len(data), 200), 3)
            data[where] = generator.integers(0, 256, 3)
            try:
                picture = decode(data.tobytes(), 4)
            except ValueError:
                continue
            assert isinstance(picture, Picture) and picture.pixels.shape[:2] == (4, 4)

"""Files that are no supported image: each is named, with a remedy."""

import base64
import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from adapters import ImageError
from adapters.data.formats.refusals import brands_of, name_of
from adapters.data.images import FORMATS, decode_image
from tests.support.models import encoded

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
PNG = encoded(PICTURE, "PNG")


def ftyp(*brands: bytes) -> bytes:
    box = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return (len(box) + 4).to_bytes(4, "big") + box + bytes(64)


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a.png", PNG)
    else:
        with tarfile.open(fileobj=out, mode="w") as tar:
            info = tarfile.TarInfo("a.png")
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FILES = {
    "JPEG 2000": (encoded(PICTURE, "JPEG2000"), "a JPEG 2000 image; save it as PNG or JPEG"),
    "JPEG 2000 codestream": (b"\xff\x4f\xff\x51" + bytes(99), "a JPEG 2000 image; save it"),
    "JPEG XL": (b"\xff\x0a" + bytes(99), "a JPEG XL image; save it as PNG or JPEG"),
    "JPEG XL container": (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + ftyp(b"jxl "), "a JPEG XL image; save it"),
    "CR3": (ftyp(b"crx ", b"isom"), r"a camera raw file \(CR3\); export the photo as JPEG"),
    "video": (ftyp(b"isom", b"mp42"), "an MP4 or QuickTime video; send a single frame"),
    "QuickTime": (b"\x00\x00\x10\x00moov" + bytes(99), "a QuickTime video; send a single frame"),
    "WebM": (b"\x1aE\xdf\xa3" + bytes(99), "a Matroska or WebM video; send a single frame"),
    "AVI": (b"RIFF\0\0\0\0AVI LIST" + bytes(99), "an AVI video; send a single frame"),
    "WAV": (b"RIFF\0\0\0\0WAVEfmt " + bytes(99), r"a sound file \(WAV\); send an image"),
    "MPEG": (b"\x00\x00\x01\xba" + bytes(99), "an MPEG video; send a single frame"),
    "SVG": (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg width="9"/>', "an SVG drawing; export it as PNG"),
    "SVG with a prefix": (b'\xef\xbb\xbf <svg:svg xmlns:svg="x">', "an SVG drawing; export it as PNG"),
    "HTML": (b"\n<!DOCTYPE html><title>404</title>", "an HTML page; a download or a login may have failed"),
    "XML": (b"<?xml version='1.0'?><Error/>", "an XML document; send the image itself"),
    "PDF": (encoded(PICTURE, "PDF"), "a PDF document; export the page as PNG or JPEG"),
    "PostScript": (encoded(PICTURE, "EPS"), "a PostScript document; export it as PNG or JPEG"),
    "DICOM": (bytes(128) + b"DICM" + bytes(64), "a DICOM file; export the image as PNG with 8 or 16 bits"),
    "gzip": (gzip.compress(PNG), "a gzip file; unpack it"),
    "zip": (archive("zip"), "a ZIP archive; unpack it"),
    "tar": (archive("tar"), "a tar archive; unpack it"),
    "Photoshop": (b"8BPS\0\1" + bytes(99), "a Photoshop document; export it"),
    "icon": (encoded(PICTURE, "ICO"), r"an icon \(ICO\); save it as PNG"),
    "Netpbm": (encoded(PICTURE, "PPM"), r"a Netpbm image \(PBM, PGM, PPM or PAM\); save it"),
    "NumPy": (b"\x93NUMPY\x01\x00" + bytes(99), "a NumPy array; save it as PNG"),
    "raw": (b"FUJIFILMCCD-RAW 0201" + bytes(99), r"a camera raw file \(RAF\); export"),
    "AppleDouble": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(99), "an AppleDouble file"),
    "Git LFS": (LFS, "a Git LFS pointer instead of the file; run `git lfs pull` first"),
    "git-annex": (b"/annex/objects/SHA256E-s1--0.png\n", "a git-annex pointer instead of the file"),
    "base64": (base64.b64encode(PNG), "base64 text of an image; decode it first, or send it in a JSON request"),
    "base64 in lines": (base64.encodebytes(encoded(PICTURE, "JPEG")), "base64 text of an image; decode it first"),
    "base64 for URLs": (base64.urlsafe_b64encode(encoded(PICTURE, "WEBP")), "base64 text of an image; decode it"),
    "data URL": (b"data:image/png;base64," + base64.b64encode(PNG), r"base64 text of an image \(a data: URL\)"),
    "zeros": (bytes(1000), "1000 bytes of zeros; the file was not written completely"),
    "a short PNG": (PNG[:10], "a PNG that is damaged or truncated after 10 bytes; send the whole file|.*truncated"),
    "a short JPEG": (encoded(PICTURE, "JPEG")[:30], "the image cannot be decoded: .*; it may be damaged or truncated"),
    "a short GIF": (encoded(PICTURE, "GIF")[:9], "a GIF that is damaged or truncated after 9 bytes"),
    "a short AVIF": (encoded(PICTURE, "AVIF")[:80], "an AVIF image that is damaged or truncated, or this Pillow"),
    "a short WebP": (encoded(PICTURE, "WEBP")[:20], "the image cannot be decoded: .*; it may be damaged or truncated"),
}


@pytest.mark.parametrize(("data", "message"), FILES.values(), ids=FILES.keys())
def test_decode_names_the_file_when_it_is_no_supported_image(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=f"^(?:{message})"):
        decode_image(data)


@pytest.mark.parametrize("data", [b"hello", b"just some text, nothing more", b"BQ", b"abcdefgh" * 20, b"\x01\x02" * 50])
def test_decode_lists_the_formats_when_bytes_are_unknown(data: bytes) -> None:
    assert name_of(data) is None
    with pytest.raises(ImageError, match=f"^not an image; expected one of {', '.join(FORMATS)}$"):
        decode_image(data)


def test_name_is_found_for_a_heic_when_no_decoder_is_installed() -> None:
    for brands in ((b"heic", b"mif1"), (b"mif1", b"heic"), (b"mif1",), (b"msf1", b"hevc")):
        assert "a HEIC image, for which this installation has no decoder" in str(name_of(ftyp(*brands)))
        assert brands_of(ftyp(*brands)) == {"HEIC"}
    assert brands_of(encoded(PICTURE, "AVIF")) == {"AVIF"}
    assert brands_of(b"\xff\xff\xff\xffftyp") == set()


def test_decode_refuses_a_heic_by_name_when_it_is_damaged() -> None:
    pytest.importorskip("pillow_heif")
    with pytest.raises(ImageError, match=r"^a HEIC image that is damaged or truncated: .*; send the whole file$"):
        decode_image(ftyp(b"heic", b"mif1"))

"""Names of files that are not supported images, each with a remedy."""

import base64
import binascii
import re
from collections.abc import Callable

SEARCHED_BYTES = 4096

_TO_PNG = "save it as PNG or JPEG"
_EXPORT = "export it as PNG or JPEG"
_UNPACK = "unpack it, and send the images"
_FRAME = "send a single frame as PNG or JPEG"
_DEPTH = "save it as PNG with 8 or 16 bits"
_RAW = "export the photo as JPEG"
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "a JPEG 2000 image", _TO_PNG),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image", _TO_PNG),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image", _TO_PNG),
    (b"\xff\x0a", "a JPEG XL image", _TO_PNG),
    (b"II\xbc", "a JPEG XR image", _TO_PNG),
    (b"\xff\xd8\xff\xf7", "a JPEG-LS image", _TO_PNG),
    (b"%PDF-", "a PDF document", "export the page as PNG or JPEG"),
    (b"%!PS", "a PostScript document", _EXPORT),
    (b"\xc5\xd0\xd3\xc6", "a PostScript document", _EXPORT),
    (b"8BPS", "a Photoshop document", _EXPORT),
    (b"gimp xcf", "a GIMP document", _EXPORT),
    (b"\x00\x00\x01\x00", "an icon (ICO)", _TO_PNG),
    (b"icns", "an icon (ICNS)", _TO_PNG),
    (b"DDS ", "a DDS texture", _TO_PNG),
    (b"qoif", "a QOI image", _TO_PNG),
    (b"v/1\x01", "an OpenEXR image", _DEPTH),
    (b"#?RADIANCE", "a Radiance HDR image", _DEPTH),
    (b"SIMPLE  =", "a FITS image", _DEPTH),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "save each image as PNG"),
    (b"\x93NUMPY", "a NumPy array", "save it as PNG; the Python client also takes uint8 arrays"),
    (b"FUJIFILMCCD-RAW", "a camera raw file (RAF)", _RAW),
    (b"IIRO", "a camera raw file (ORF)", _RAW),
    (b"IIU\x00", "a camera raw file (RW2)", _RAW),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video", _FRAME),
    (b"OggS", "an Ogg video or sound", _FRAME),
    (b"FLV\x01", "a Flash video", _FRAME),
    (b"\x00\x00\x01\xba", "an MPEG video", _FRAME),
    (b"\x00\x00\x01\xb3", "an MPEG video", _FRAME),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"PK\x03\x04", "a ZIP archive", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (
        b"\x00\x05\x16\x07",
        "an AppleDouble file, the attributes of another file",
        "send the file without ._ in its name",
    ),
    (b"version https://git-lfs.github.com/", "a Git LFS pointer instead of the file", "run `git lfs pull` first"),
    (b"/annex/objects/", "a git-annex pointer instead of the file", "run `git annex get` first"),
)
_ISO_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"jp2 ", b"jpx ", b"jpm "), "JPEG 2000"),
    b"jxl ": "JPEG XL",
    b"crx ": "CR3",
}
_SUPPORTED_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}
_BASE64_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"II*\x00", b"MM\x00*")


def name_of(data: bytes) -> str | None:
    """Return the name of a file that no decoder took, and what to do, as an error's text; None for unknown bytes."""
    for start, name, remedy in _STARTS:
        if data.startswith(start):
            return f"{name}; {remedy}"
    for recognise in _RECOGNISERS:
        if found := recognise(data):
            return found
    return None


def brands_of(data: bytes) -> set[str]:
    """Return the kinds of image that an ISO base media file (AVIF, HEIC, JPEG 2000) names in its first box."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    brands = [box[:4], *(box[i : i + 4] for i in range(8, len(box), 4))]
    kinds = {_ISO_BRANDS[brand] for brand in brands if brand in _ISO_BRANDS}
    return kinds or ({"HEIC"} if {b"mif1", b"msf1"} & {*brands} else set())  # a HEIC without its own brand


def _iso_media(data: bytes) -> str | None:
    if data[4:8] in (b"moov", b"mdat", b"wide"):
        return f"a QuickTime video; {_FRAME}"
    if data[4:8] != b"ftyp":
        return None
    kinds = brands_of(data)
    if "CR3" in kinds:
        return f"a camera raw file (CR3); {_RAW}"
    if "HEIC" in kinds:
        return (
            "a HEIC image, for which this installation has no decoder; save it as JPEG, or install 'karst-hub[heic]' "
            "where images are decoded (docs/http.md)"
        )
    if "AVIF" in kinds:
        return "an AVIF image that is damaged or truncated, or this Pillow has no AVIF decoder; save it as PNG or JPEG"
    if kinds:
        return f"a {kinds.pop()} image; {_TO_PNG}"
    return f"an MP4 or QuickTime video; {_FRAME}"


def _riff(data: bytes) -> str | None:
    if data[:4] != b"RIFF" or data[8:12] == b"WEBP":
        return None
    kinds = {b"AVI ": f"an AVI video; {_FRAME}", b"WAVE": "a sound file (WAV); send an image"}
    return kinds.get(data[8:12], f"a RIFF file of another kind than WebP; {_TO_PNG}")


def _dicom(data: bytes) -> str | None:
    return f"a DICOM file; {_DEPTH.replace('save it', 'export the image')}" if data[128:132] == b"DICM" else None


def _tar(data: bytes) -> str | None:
    return f"a tar archive; {_UNPACK}" if data[257:262] == b"ustar" else None


def _netpbm(data: bytes) -> str | None:
    return f"a Netpbm image (PBM, PGM, PPM or PAM); {_TO_PNG}" if re.match(rb"P[1-7][\s#]", data) else None


def _markup(data: bytes) -> str | None:
    text = data[:SEARCHED_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not text.startswith(b"<"):
        return None
    if re.search(rb"<(?:\w+:)?svg[\s>/]", text):
        return "an SVG drawing; export it as PNG"
    if text.startswith(b"<!doctype html") or b"<html" in text:
        return "an HTML page; a download or a login may have failed, so fetch the image again"
    return "an XML document; send the image itself"


def _base64(data: bytes) -> str | None:
    """Recognise an image as base64 text, with or without the header of a `data:` URL."""
    text = data[:SEARCHED_BYTES].strip()
    remedy = "decode it first, or send it in a JSON request"
    if re.match(rb"data:image/[\w.+-]+(?:;[\w=.+-]+)*,", text):
        return f"base64 text of an image (a data: URL); {remedy}"
    digits = re.sub(rb"\s", b"", text).translate(bytes.maketrans(b"-_", b"+/"))[:64]
    if len(digits) < 8 or not re.fullmatch(rb"[A-Za-z0-9+/]+=*", digits):
        return None
    try:
        start = base64.b64decode(digits[: len(digits) // 4 * 4])
    except binascii.Error:
        return None
    return f"base64 text of an image; {remedy}" if start.startswith(_BASE64_STARTS) else None


def _zeros(data: bytes) -> str | None:
    if data.strip(b"\0"):
        return None
    return f"{len(data)} bytes of zeros; the file was not written completely, so copy it again"


def _damaged(data: bytes) -> str | None:
    name = next((name for start, name in _SUPPORTED_STARTS.items() if data.startswith(start)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        name = "WebP"
    return f"a {name} that is damaged or truncated after {len(data)} bytes; send the whole file" if name else None


_RECOGNISERS: tuple[Callable[[bytes], str | None], ...] = (
    _iso_media,
    _riff,
    _dicom,
    _tar,
    _netpbm,
    _markup,
    _base64,
    _zeros,
    _damaged,
)

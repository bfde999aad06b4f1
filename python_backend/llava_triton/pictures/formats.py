"""Which picture and video files are decoded, and what those are called that are not."""

from __future__ import annotations

from PIL import AvifImagePlugin, features

try:
    import pillow_heif
except ImportError:  # an extra; without it HEIC is refused by its name
    pillow_heif = None

SEND_INSTEAD = "send it as JPEG or PNG"
VIDEOS = "MP4, MOV, WebM, Matroska or GIF"

_BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "PostScript"),
    (b"<svg", "SVG"),
    (b"\x1a\x45\xdf\xa3", "Matroska"),
)
_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_VIDEO = "video or other ISO media"
_PILLOW_NAMES = {"HEIC": "HEIF"}
"""Pillow's names of formats, where they are others."""
_QUICKTIME_ATOMS = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
"""With one of these an old QuickTime file may begin, which names no brand."""


def _decoded_formats() -> tuple[str, ...]:
    formats = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
    if features.check("avif"):
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # as all decoders: the cores are others', too
        formats.append("AVIF")
    if pillow_heif is not None:
        pillow_heif.options.DECODE_THREADS = 1
        pillow_heif.options.THUMBNAILS = False
        pillow_heif.options.DEPTH_IMAGES = False
        pillow_heif.options.AUX_IMAGES = False
        pillow_heif.register_heif_opener()
        formats.append("HEIC")
    return tuple(formats)


DECODED = _decoded_formats()
"""What is tried on a client's bytes. Pillow reads many more; each is one more parser to attack."""
PILLOW_FORMATS = tuple(_PILLOW_NAMES.get(name, name) for name in DECODED)
"""The same, by Pillow's names."""


def format_of(data: bytes) -> str | None:
    """What a file is by its first bytes; None where they say nothing. No base64 text of a file
    begins like one."""
    for beginning, name in _BEGINNINGS:
        if data.startswith(beginning):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    return None


def container_of(data: bytes) -> str | None:
    """FFmpeg's name of a video file's container, by its first bytes; None: it is none of
    `VIDEOS`."""
    kind = format_of(data)
    # Before its name is an atom's size; no base64 text begins with so small a byte.
    old = data[4:8] in _QUICKTIME_ATOMS and data[0] < ord("\t")
    if kind == _VIDEO or old:
        return "mov"
    return {"Matroska": "matroska", "GIF": "gif"}.get(kind or "")


def _iso_media(data: bytes) -> str:
    size = min(int.from_bytes(data[:4], "big"), 256)
    # The major brand, its version, and the brands that it is compatible with.
    brands = {data[at : at + 4] for at in (8, *range(16, size, 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIC" if brands & _HEIC_BRANDS else _VIDEO

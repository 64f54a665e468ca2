"""The tags of a TIFF that say where it lies, as bytes: equal bytes, equal georeference."""

import struct
from pathlib import Path

# GeoTIFF 1.1: pixel scale, matrix (and its older number), tie points, keys with their numbers and
# texts.
_GEO_TAGS = {33550, 34264, 33920, 33922, 34735, 34736, 34737}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8}
_MOST_ENTRIES, _MOST_BYTES = 4096, 1 << 16


def geo_tags(path: Path) -> bytes | None:
    """All geographic tags of the first image of a TIFF or BigTIFF, with their numbers and types.

    None where the file is no such TIFF, is damaged, or holds more than such tags need.
    """
    try:
        with open(path, "rb") as file:
            return _read(file)
    except (OSError, struct.error, KeyError, ValueError):
        return None


def _read(file) -> bytes:
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}[start[:2]]
    (magic,) = struct.unpack_from(order + "H", start, 2)
    # Offset of the directory, its number of entries, and an entry: tag, type, count, value.
    at, head, entry = {
        42: (4, order + "I", order + "HHI4s"),
        43: (8, order + "Q", order + "HHQ8s"),
    }[magic]
    file.seek(*struct.unpack_from(head, start, at))
    number = order + ("H" if magic == 42 else "Q")
    (count,) = struct.unpack(number, file.read(struct.calcsize(number)))
    if count > _MOST_ENTRIES:
        raise ValueError("too many tags")
    found = [start[:2]]
    for tag, kind, values, held in struct.iter_unpack(
        entry, file.read(count * struct.calcsize(entry))
    ):
        if tag not in _GEO_TAGS:
            continue
        size = values * _SIZES[kind]
        if size > _MOST_BYTES:
            raise ValueError("too large a tag")
        if size > len(held):
            file.seek(*struct.unpack(head, held))
            held = file.read(size)
            if len(held) < size:
                raise ValueError("cut short")
        found += [struct.pack("<HHQ", tag, kind, values), held[:size]]
    return b"".join(found)

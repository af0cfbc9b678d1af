"""Damage to label files: what disks do to them, and what forgers do before they seal them again."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from pipeline.errors import DataError
from pipeline.labels.cache import LabelCache
from pipeline.labels.file import SEAL_SIZE
from tests.support.hostile_reader import HostileReader
from tests.support.label_samples import flip, parts_in, reseal, row_of
from tests.support.tally import Tally

# Structures of HDF5's format that end with a checksum of their own.
_SIGNATURES = (b"OHDR", b"OCHK", b"BTHD", b"BTIN", b"BTLF", b"FRHP", b"FHDB", b"FHIB", b"FAHD", b"FADB")
_NUMBERS = (0, 1, 2, 7, 40, 255, 256, 511, 512, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
_WORD = 2**32 - 1


def damage(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Flip, cut, grow, zero, repeat or exchange some bytes.

    Args:
        data: A whole file.
        other: Another whole file, from which a piece may come.
        rng: Decides what and where.

    Returns:
        Bytes that differ from `data`.
    """
    start, length = rng.randrange(len(data)), rng.randrange(1, 600)
    elsewhere, foreign = rng.randrange(len(data)), rng.randrange(len(other))
    padding = rng.randrange(min(SEAL_SIZE, len(data)))
    damaged = rng.choice(
        [
            lambda: flip(data, start, rng.randrange(8)),
            lambda: flip(flip(data, start, rng.randrange(8)), elsewhere, rng.randrange(8)),
            lambda: flip(data, padding, rng.randrange(8)),
            lambda: data[:start],
            lambda: data[start:],
            lambda: data + rng.randbytes(length),
            lambda: data + data,
            lambda: data[:start] + rng.randbytes(length) + data[start:],
            lambda: data[:start] + bytes(length) + data[start + length :],
            lambda: data[:start] + data[start + length :],
            lambda: data[:start] + data[elsewhere : elsewhere + length] + data[start + length :],
            lambda: data[:start] + other[start : start + length] + data[start + length :],
            lambda: data[:start] + other[foreign : foreign + length] + data[start + length :],
            lambda: data[:start] + other[start:],
        ]
    )()
    return damaged if damaged not in (data, other) else damage(data, other, rng)


def forge_at_random(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Change what HDF5 reads so that every checksum is right, and seal it again.

    Half of the forgeries change numbers within HDF5's own structures, which no random damage reaches because each
    structure has a checksum; these are computed again.
    """
    if rng.random() < 0.5:
        return reseal(data[:SEAL_SIZE] + damage(data[SEAL_SIZE:], other[SEAL_SIZE:], rng))
    changed = bytearray(data)
    spans = checksummed(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        start, end = rng.choice(spans)
        width = rng.choice((1, 1, 2, 4, 8))
        at = rng.randrange(start, max(start + 1, end - 4 - width))
        number = rng.choice(_NUMBERS) if rng.random() < 0.7 else rng.getrandbits(64)
        changed[at : at + width] = (number & (2 ** (8 * width) - 1)).to_bytes(width, "little")
    return reseal(with_checksums(bytes(changed), spans))


def with_checksums(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    """Compute the checksums of HDF5's structures again."""
    changed = bytearray(data)
    for start, end in spans:
        if data[start : start + 4] != b"TREE":
            changed[end - 4 : end] = lookup3(data[start : end - 4]).to_bytes(4, "little")
    return bytes(changed)


def damage_files(path: Path, data: bytes, other: bytes, count: int, rng: random.Random) -> Tally:
    """Open damaged copies of a sealed file: each must be refused, and no label of it seen."""
    tally = Tally()
    for number in range(count):
        path.write_bytes(damage(data, other, rng))
        try:
            LabelCache.open(path)
        except DataError:
            tally.counts["found"] += 1
        else:
            tally.note(f"mutation {number}", ["accepted"])
    tally.counts["mutations"] = count
    return tally


def damage_parts(folder: Path, count: int, rng: random.Random) -> Tally:
    """Read damaged parts: each must count as missing, and leave the others as they are."""
    tally, parts = Tally(), parts_in(folder)
    for view in range(3):
        parts.write(view, row_of(view))
    files = [folder / f"{view:06d}.part" for view in range(3)]
    whole = [file.read_bytes() for file in files]
    for number in range(count):
        view = rng.randrange(3)
        files[view].write_bytes(damage(whole[view], whole[view - 1], rng))
        missing = parts.missing(3)
        tally.counts["found"] += missing == [view]
        tally.note(f"mutation {number}", [] if missing == [view] else ["accepted"])
        files[view].write_bytes(whole[view])
    tally.counts["mutations"] = count
    return tally


def read_forged(data: bytes, other: bytes, count: int, rng: random.Random) -> Tally:
    """Read forged files: each must be refused, or give exactly the labels and digests that it holds."""
    tally, reader = Tally(), HostileReader()
    for number in range(count):
        verdict = reader.read(forge_at_random(data, other, rng))
        kind = verdict.partition(":")[0]
        tally.counts[kind] += 1
        tally.note(f"forgery {number}", [] if kind in ("accepted", "refused") else [verdict])
    reader.close()
    tally.counts["forgeries"] = count
    return tally


def checksummed(data: bytes) -> list[tuple[int, int]]:
    """Find where HDF5's structures begin and end, checksum included; also B-tree nodes, which have none."""
    spans = [(SEAL_SIZE, SEAL_SIZE + 48)]
    for at in range(SEAL_SIZE, len(data)):
        signature = data[at : at + 4]
        if signature == b"OHDR":
            flags = data[at + 5]
            sizes = at + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
            width = 1 << (flags & 3)
            spans.append((at, sizes + width + int.from_bytes(data[sizes : sizes + width], "little") + 4))
        elif signature == b"OCHK":
            # A header's continuation names address and length.
            named = data.index(struct.pack("<Q", at - SEAL_SIZE))
            spans.append((at, at + int.from_bytes(data[named + 8 : named + 16], "little")))
        elif signature == b"TREE":
            spans.append((at, at + 120))
        assert signature not in _SIGNATURES[2:], f"{signature!r} is not expected in a label cache"
    for start, end in spans:
        if data[start : start + 4] != b"TREE":
            assert lookup3(data[start : end - 4]) == int.from_bytes(data[end - 4 : end], "little")
    return spans


def lookup3(data: bytes) -> int:
    """Return Bob Jenkins' hash, HDF5's checksum of its metadata.

    Source: https://burtleburtle.net/bob/c/lookup3.c, hashlittle with an initial value of 0.
    """
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    num_blocks = max(0, (len(data) - 1) // 12)
    for block in range(num_blocks):
        x, y, z = struct.unpack_from("<III", data, 12 * block)
        a, b, c = (a + x) & _WORD, (b + y) & _WORD, (c + z) & _WORD
        a = (a - c) & _WORD ^ _rotate(c, 4)
        c = (c + b) & _WORD
        b = (b - a) & _WORD ^ _rotate(a, 6)
        a = (a + c) & _WORD
        c = (c - b) & _WORD ^ _rotate(b, 8)
        b = (b + a) & _WORD
        a = (a - c) & _WORD ^ _rotate(c, 16)
        c = (c + b) & _WORD
        b = (b - a) & _WORD ^ _rotate(a, 19)
        a = (a + c) & _WORD
        c = (c - b) & _WORD ^ _rotate(b, 4)
        b = (b + a) & _WORD
    rest = data[12 * num_blocks :]
    if not rest:
        return c
    x, y, z = struct.unpack("<III", rest.ljust(12, b"\0"))
    a, b, c = (a + x) & _WORD, (b + y) & _WORD, (c + z) & _WORD
    c = (c ^ b) - _rotate(b, 14) & _WORD
    a = (a ^ c) - _rotate(c, 11) & _WORD
    b = (b ^ a) - _rotate(a, 25) & _WORD
    c = (c ^ b) - _rotate(b, 16) & _WORD
    a = (a ^ c) - _rotate(c, 4) & _WORD
    b = (b ^ a) - _rotate(a, 14) & _WORD
    c = (c ^ b) - _rotate(b, 24) & _WORD
    return c


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & _WORD

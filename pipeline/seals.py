"""The seal of a label cache: 512 bytes in front of an HDF5 file that vouch for every byte behind them.

HDF5 calls them the user block and leaves them alone, so that any HDF5 tool still opens the file. Layout, all
numbers little-endian: magic (8 bytes), version (uint32), number of bytes that follow the block (uint64),
SHA-256 of those bytes (32 bytes), zeros. Since all of it follows from the bytes behind, not one bit of a
sealed file can change unnoticed, and the check needs no HDF5.
"""

from __future__ import annotations

import hashlib
import struct

SEAL_SIZE = 512
MAGIC = b"\x93TITNLC\n"
_LAYOUT = struct.Struct("<8sIQ32s")


def make_seal(content: memoryview, version: int) -> bytes:
    """Make the block that belongs in front of some content.

    Args:
        content: Everything behind the block.
        version: Version of the content's schema.

    Returns:
        SEAL_SIZE bytes.
    """
    digest = hashlib.sha256(content).digest()
    return _LAYOUT.pack(MAGIC, version, len(content), digest).ljust(SEAL_SIZE, b"\0")


def check_beginning(data: bytes, version: int) -> None:
    """Refuse what cannot be a sealed file, by its first bytes.

    Args:
        data: The first SEAL_SIZE bytes, or more.
        version: The schema version that the caller reads.

    Raises:
        ValueError: What is wrong, to follow the name of the file.
    """
    if len(data) < SEAL_SIZE:
        raise ValueError(f"it has {len(data)} bytes, less than a seal")
    magic, found_version, *_ = _LAYOUT.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it does not begin with the seal of a label cache")
    if found_version != version:
        raise ValueError(f"its schema version is {found_version}, this release reads {version}")


def check_seal(data: bytes, version: int) -> None:
    """Refuse a file of which any byte is not as sealed.

    Args:
        data: The whole file.
        version: The schema version that the caller reads.

    Raises:
        ValueError: What is wrong, to follow the name of the file.
    """
    check_beginning(data, version)
    *_, length, _ = _LAYOUT.unpack_from(data)
    content = memoryview(data)[SEAL_SIZE:]
    if length != len(content):
        raise ValueError(f"it holds {len(content)} bytes behind the seal, sealed were {length}")
    if data[:SEAL_SIZE] != make_seal(content, version):
        raise ValueError("its bytes are not those that were sealed (SHA-256 differs)")

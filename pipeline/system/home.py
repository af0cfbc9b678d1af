"""The user's home directory, and what is kept there; a container's user may have none.

There is none where HOME is unset and the system's list of users lacks this one, as under `docker run --user`; or it
cannot be written to, as `/` in a cluster that gives each container a user of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

WAY_OUT = "set HOME to a folder that can be written to"
# Where torch's compiler, Triton and matplotlib keep what they make. Without a home they fail, make a folder `~`, or
# complain.
LIBRARY_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME", "MPLCONFIGDIR")


def cache_folder() -> Path | None:
    """Return the folder of the user's caches, XDG_CACHE_HOME or ~/.cache; None without a home directory."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def can_keep() -> bool:
    """Tell whether what is made in `cache_folder` can stay there."""
    folder = cache_folder()
    if folder is None:
        return False
    with contextlib.suppress(OSError):  # a folder that cannot be searched, or a relative one where there is none
        for path in (folder, *folder.absolute().parents):
            with contextlib.suppress(FileNotFoundError):
                path.stat()
                return os.access(path, os.W_OK | os.X_OK)
    return False


def lend_caches() -> None:
    """Give libraries a folder for their caches that ends with this process, where the user's cannot be written to.

    Call before torch is imported. Folders that the user names stay.
    """
    missing = [name for name in LIBRARY_CACHES if name not in os.environ]
    if missing and not can_keep():
        with contextlib.suppress(OSError):  # there is not even a folder for temporary files
            folder = tempfile.mkdtemp(prefix="titn-pipeline-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ.update(dict.fromkeys(missing, folder))

"""Whether results can be kept, asked before the work that they cost."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_writable(folder: Path) -> None:
    """Files can be written into ``folder``, which need not be there yet. Nothing is left behind.

    Raises:
        OSError: They cannot; it says why.
    """
    place = folder
    try:
        while not (place.exists() or place.is_symlink()) and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        where = "" if place == folder else f", {place}"
        raise OSError(
            f"nothing can be written into {folder} ({error.strerror or error}{where}); give another folder, or make it writable"
        ) from None

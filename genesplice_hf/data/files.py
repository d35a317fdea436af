"""Opening files by what they hold, not by how they are named: plain, gzip or bgzip, with clear complaints."""

import difflib
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO, cast

from genesplice_hf.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
# The empty block with which every complete bgzip file ends (SAM specification, section 4.1.2).
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def existing_file(path: str | PathLike[str]) -> Path:
    """Returns `path` with `~` expanded; raises `DataError` where no file stands there."""
    found = Path(path).expanduser()
    if found.is_dir():
        raise DataError(f"`path` must be a file, but {found} is a folder.")
    if not found.exists():
        raise DataError(f"`path` must be an existing file, but there is no {found}; check the spelling.")
    return found


def is_gzip(path: Path) -> bool:
    """Whether the file is gzip or bgzip, told by its first two bytes."""
    with path.open("rb") as stream:
        return stream.read(2) == GZIP_MAGIC


def is_bgzip(path: Path) -> bool:
    """Whether the file is bgzip: gzip whose first header carries the `BC` field at bytes 12 and 13."""
    with path.open("rb") as stream:
        head = stream.read(14)
    return head[:4] == GZIP_MAGIC + b"\x08\x04" and head[12:] == b"BC"


@contextmanager
def open_binary(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a plain, gzip or bgzip file for reading bytes, whatever its suffix says.

    Raises:
        DataError: there is no such file, or its compression is cut off or damaged.
    """
    file = existing_file(path)
    if is_bgzip(file):
        check_bgzip_end(file)
    try:
        with gzip.open(file, "rb") if is_gzip(file) else file.open("rb") as stream:
            yield cast(BinaryIO, stream)
    except EOFError as error:
        raise DataError(f"{file} is a truncated gzip file; copy or download it again.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} is a damaged gzip file ({error}); copy or download it again.") from error


def check_bgzip_end(file: Path) -> None:
    """Raises `DataError` unless a bgzip file has its end block; cut between blocks, it is legal gzip."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - len(BGZIP_END)))
        end = stream.read()
    if end != BGZIP_END:
        raise DataError(f"{file} is a truncated bgzip file (its end block is missing); copy or download it again.")


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the one of `names` that is spelled most like `name`, for error messages."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]

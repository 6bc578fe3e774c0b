"""Reads files that may be compressed, as bytes or as text."""

import bz2
import gzip
import io
import lzma
import zlib
from typing import BinaryIO, cast

from mythos_jax.data.input_file import InputFile
from mythos_jax.data.remote import open_remote

# What decompressors raise for damaged files, besides OSError.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)


def open_bytes(file: InputFile) -> BinaryIO:
    """The content of a file, decompressed as it is read. Raises OSError; reading also raises `DAMAGED`."""
    match file.compression:
        case ".gz":
            return cast(BinaryIO, gzip.open(open_stored(file), "rb"))
        case ".bz2":
            return cast(BinaryIO, bz2.open(open_stored(file), "rb"))
        case ".xz":
            return cast(BinaryIO, lzma.open(open_stored(file), "rb"))
        case ".zst":
            import pyarrow

            # An open file, because pyarrow takes no path that is not UTF-8.
            return io.BufferedReader(pyarrow.CompressedInputStream(open_stored(file), "zstd"))
    return open_stored(file)


def open_stored(file: InputFile) -> BinaryIO:
    """The content of a file as it is stored. Raises OSError; for a URL also StorageError, as reading does."""
    return open_remote(file) if file.url else open(file.path, "rb")


def open_text(file: InputFile) -> io.TextIOWrapper:
    """The content as text: UTF-8 without a byte order mark, line ends as they are. Raises as `open_bytes` does, and
    reading also UnicodeDecodeError."""
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", newline="")

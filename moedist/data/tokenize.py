"""Writes token files: text is encoded once, and every run maps the result."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from moedist.config import ConfigError, require
from moedist.data.paths import as_path, find_files
from moedist.data.texts import read_texts
from moedist.data.token_files import LLMC_HEADER, LLMC_KINDS, MEGATRON_DTYPES, MEGATRON_HEADER, MEGATRON_MAGIC
from moedist.data.tokenizer import open_tokenizer, smallest_dtype

WriteFormat = Literal["nanogpt", "llmc", "raw", "megatron"]

MEGATRON_UINT16_BELOW = 65500
"""Vocabularies below it are written as uint16, others as int32, as Megatron's ``DType.optimal_dtype`` has it."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        paths: the files; for Megatron the ``.bin`` and the ``.idx``.
        num_documents: documents that were not empty.
        num_tokens: ids, those that end documents included.
        dtype: name of their type.
        vocab_size: of the tokenizer.
        end_id: the id that ends each document.
    """

    paths: tuple[Path, ...]
    num_documents: int
    num_tokens: int
    dtype: str
    vocab_size: int
    end_id: int


def tokenize_files(
    files: tuple[str, ...],
    output: str,
    file_format: WriteFormat,
    *,
    tokenizer: str | None = None,
    text_key: str = "text",
    eod_id: int | None = None,
    force: bool = False,
) -> Written:
    """Encodes text files into one token file.

    Documents stream through: memory holds some hundred at a time. The output appears under its name only when it is
    whole and on disk; until then, and after a failure, what was there before stays as it was.

    Args:
        files: files, globs and folders of text; ``.jsonl`` line by line.
        output: the file to write; for Megatron the prefix, with or without ``.bin``.
        file_format: see `moedist.data.token_files`; ``raw`` is bare uint16 or, for large vocabularies, uint32.
        tokenizer: a ``tokenizer.json``; None for bytes.
        text_key: where a line of a ``.jsonl`` file keeps its text.
        eod_id: the id that ends each document; None for the tokenizer's own.
        force: whether to replace files that exist. Input is never replaced.

    Raises:
        ConfigError: bad input, a format that cannot hold it, or output that exists.
        OSError: the output cannot be written.
    """
    opened = open_tokenizer(tokenizer, eod_id)
    inputs = find_files("files", files)
    dtype = _dtype_of(file_format, opened.vocab_size)
    targets = _targets(output, file_format)
    for target in targets:
        _require_free(target, [*inputs, *([as_path(tokenizer)] if tokenizer else [])], force)
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    length_G: list[int] = []
    documents = _counted(opened.encode(read_texts("files", inputs, text_key)), length_G)
    with _appear_whole(targets, force) as temporary:
        with temporary[0].open("wb") as file:
            _write_tokens(file, documents, file_format, dtype)
        require(len(length_G) > 0, "files", list(files), "hold no text", "Name files that are not empty.")
        if file_format == "megatron":
            with temporary[1].open("wb") as file:
                _write_megatron_index(file, np.array(length_G, np.int64), dtype)
    return Written(targets, len(length_G), sum(length_G), dtype.name, opened.vocab_size, opened.end_id)


def _dtype_of(file_format: WriteFormat, vocab_size: int) -> np.dtype:
    if file_format == "megatron":
        return np.dtype("<u2") if vocab_size < MEGATRON_UINT16_BELOW else np.dtype("<i4")
    dtype = smallest_dtype(vocab_size).newbyteorder("<")
    remedy = "Use --format raw, llmc or megatron, which have wider types."
    fits = file_format != "nanogpt" or dtype.itemsize == 2
    require(fits, "format", file_format, f"has uint16 ids only, and the tokenizer has {vocab_size}", remedy)
    return dtype


def _targets(output: str, file_format: WriteFormat) -> tuple[Path, ...]:
    path = as_path(output)
    if file_format != "megatron":
        return (path,)
    prefix = str(path.with_suffix("")) if path.suffix in (".bin", ".idx") else str(path)
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _require_free(target: Path, inputs: Iterable[Path], force: bool) -> None:
    exists = os.path.lexists(target)
    require(not target.is_dir(), "output", str(target), "is a folder", "Name a file in it.")
    own = exists and any(source.exists() and target.exists() and source.samefile(target) for source in inputs)
    require(not own, "output", str(target), "is one of the files to read", "Name another output.")
    require(force or not exists, "output", str(target), "exists", "Name another output, or replace it with --force.")


def _counted(documents: Iterable[np.ndarray], length_G: list[int]) -> Iterator[np.ndarray]:
    for document in documents:
        if len(document):
            length_G.append(len(document))
            yield document


def _write_tokens(file: BinaryIO, documents: Iterable[np.ndarray], file_format: WriteFormat, dtype: np.dtype) -> None:
    header = np.zeros(LLMC_HEADER, "<i4")
    if file_format == "llmc":
        file.write(header.tobytes())
    num_tokens = 0
    for document in documents:
        num_tokens += len(document)
        file.write(document.astype(dtype, copy=False).tobytes())
    if file_format == "llmc":
        remedy = "Write several files, or use --format raw."
        require(num_tokens < 1 << 31, "format", "llmc", f"cannot count {num_tokens} tokens in 31 bits", remedy)
        magic = next(magic for magic, (_, kind) in LLMC_KINDS.items() if kind == dtype)
        header[:3] = magic, LLMC_KINDS[magic][0], num_tokens
        file.seek(0)
        file.write(header.tobytes())


def _write_megatron_index(file: BinaryIO, length_G: np.ndarray, dtype: np.dtype) -> None:
    """One sequence per document."""
    code = next(code for code, kind in MEGATRON_DTYPES.items() if kind == dtype)
    file.write(MEGATRON_HEADER.pack(MEGATRON_MAGIC, 1, code, len(length_G), len(length_G) + 1))
    file.write(length_G.astype("<i4").tobytes())
    file.write(((np.cumsum(length_G) - length_G) * dtype.itemsize).astype("<i8").tobytes())
    file.write(np.arange(len(length_G) + 1, dtype="<i8").tobytes())


@contextmanager
def _appear_whole(targets: tuple[Path, ...], force: bool) -> Iterator[list[Path]]:
    """Temporary files beside ``targets``, which take their names when the block ends well and vanish otherwise."""
    with ExitStack() as stack:
        temporary = []
        for target in targets:
            path = target.with_name(f".{target.name}.{os.getpid()}.part")
            # Exclusive: neither a file nor a link that lies there is written through.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            stack.callback(path.unlink, missing_ok=True)
            temporary.append(path)
        yield temporary
        for path in temporary:
            _flush_to_disk(path)
        with ExitStack() as undo:
            for path, target in zip(temporary, targets, strict=True):
                if force:
                    path.replace(target)
                else:
                    _take_name(path, target)
                    undo.callback(target.unlink)
            undo.pop_all()


def _take_name(path: Path, target: Path) -> None:
    """Renames without replacing: a file that came in the meantime stays."""
    try:
        os.link(path, target)
    except FileExistsError:
        remedy = "Name another output, or replace it with --force."
        raise ConfigError("output", str(target), "came into being meanwhile", remedy) from None
    except OSError:  # a file system without hard links
        _require_free(target, (), force=False)
        path.rename(target)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

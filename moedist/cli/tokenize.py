"""``moedist tokenize``: text files in, a token file out."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode

EXAMPLES = """\
examples:
  # bytes of every text file below a folder, as nanoGPT keeps them
  moedist tokenize corpus/ --output corpus.bin

  # JSON lines through a tokenizer file, as Megatron keeps them (corpus.bin and corpus.idx)
  moedist tokenize 'shards/*.jsonl' --tokenizer tokenizer.json --format megatron --output corpus

  # llm.c's format, the text under another key, replacing what is there
  moedist tokenize docs.jsonl --text-key content --tokenizer tokenizer.json --format llmc --output train.bin --force

formats:
  nanogpt   bare uint16 ids (.bin)
  llmc      1024-byte header, then uint16 or uint32 ids (.bin)
  raw       bare uint16 or uint32 ids, as OLMo's headerless .npy
  megatron  bare ids (.bin) with an index of documents (.idx)

exit codes: 0 written, 2 bad input or output that exists, 4 disk or environment
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tokenize",
        help="write token files from text",
        description="Encodes text once into a token file that data=tokens maps.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", help="text files, globs (quoted) and folders; .jsonl is read line by line")
    parser.add_argument("--output", "-o", required=True, help="the file to write; for megatron the prefix")
    parser.add_argument("--format", choices=("nanogpt", "llmc", "raw", "megatron"), default="nanogpt", help="see below")
    parser.add_argument("--tokenizer", help="a Hugging Face tokenizers file (tokenizer.json); left out: bytes")
    parser.add_argument("--text-key", default="text", help="where a .jsonl line keeps its text (default: text)")
    parser.add_argument("--eod-id", type=int, help="id that ends a document; left out: 256 or the tokenizer's own")
    parser.add_argument("--force", action="store_true", help="replace output that exists")
    parser.set_defaults(main=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Writes the file and says how to train on it. Returns the exit code."""
    from moedist.data.tokenize import tokenize_files

    try:
        written = tokenize_files(
            tuple(args.files),
            args.output,
            args.format,
            tokenizer=args.tokenizer,
            text_key=args.text_key,
            eod_id=args.eod_id,
            force=args.force,
        )
    except ConfigError as error:
        print(f"moedist tokenize: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    except OSError as error:
        problem = f"cannot write {args.output}: {error.strerror or error}. Nothing was replaced."
        remedy = "Make room, or name an output where this user may write."
        print(f"moedist tokenize: {problem} {remedy}", file=sys.stderr)
        return ExitCode.ENVIRONMENT
    names = " and ".join(str(path) for path in written.paths)
    print(f"Wrote {names}: {written.num_documents} documents, {written.num_tokens} tokens, {written.dtype}.")
    train = ["moedist", "train", "data=tokens", f"data.files=[{written.paths[0]}]"]
    train += [f"data.vocab_size={written.vocab_size}", f"data.eod_id={written.end_id}"]
    if args.format == "raw":
        train += ["data.format=raw", f"data.dtype={written.dtype}"]
    print(f"Train on it: {shlex.join(train)}")
    return 0

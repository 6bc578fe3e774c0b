"""`mythos data`: so far `mythos data prepare`."""

import argparse
from typing import Annotated

from mythos_jax.commands.arguments import of_type, path
from mythos_jax.config.data import Bytes, HeldOutFraction
from mythos_jax.errors import DONE
from mythos_jax.typed import Between, PositiveInt

SUMMARY = "Prepare text for training."
PREPARE = "Turn text files, folders, JSON, CSV and Parquet into token rows."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    prepare = subparsers.add_parser("prepare", help=PREPARE, description=PREPARE, allow_abbrev=False)
    # Suppressed default: a subparser's default would overwrite a --debug before `prepare`.
    prepare.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    prepare.add_argument("sources", type=path, nargs="+", metavar="SRC", help='a file, a folder, or "stdlib"')
    prepare.add_argument("--out", type=path, required=True, metavar="DIR", help="where the rows are written")
    prepare.add_argument(
        "--tokenizer",
        type=path,
        default="bytes",
        metavar="FILE",
        help='a tokenizer.json, or its folder (default: "bytes")',
    )
    prepare.add_argument(
        "--end-of-document", metavar="NAME", help="the tokenizer's end-of-document token, if it has an unusual name"
    )
    prepare.add_argument(
        "--seq-len",
        type=of_type(PositiveInt),
        default=1024,
        metavar="T",
        help="tokens predicted per row (default 1024)",
    )
    prepare.add_argument(
        "--held-out-fraction",
        type=of_type(HeldOutFraction),
        default=0.05,
        metavar="F",
        help="fraction of documents held out; of a single document, its end (default 0.05)",
    )
    prepare.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help='the text of JSON, CSV and Parquet records (default "text")',
    )
    prepare.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="a file or record that cannot be read: stop, and keep the finished work (default), or leave it out",
    )
    prepare.add_argument(
        "--max-bytes",
        type=of_type(Bytes),
        default=0,
        metavar="N",
        help="stop after N bytes of text (default 0: read all of it)",
    )
    prepare.add_argument(
        "--workers",
        type=of_type(Annotated[int, Between(0, 1024)]),
        default=0,
        metavar="N",
        help="threads that tokenize (default 0: one per core)",
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.data.prepare import prepare

    manifest = prepare(
        arguments.sources,
        arguments.out,
        tokenizer=arguments.tokenizer,
        end_of_document=arguments.end_of_document,
        seq_len=arguments.seq_len,
        held_out_fraction=arguments.held_out_fraction,
        max_bytes=arguments.max_bytes,
        text_column=arguments.text_column,
        on_error=arguments.on_error,
        workers=arguments.workers,
    )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.rows:,} rows, {split.tokens:,} tokens, {split.documents:,} documents")
    if manifest.left_out_count:
        print(f"left out: {manifest.left_out_count:,} files and records, see {arguments.out}/manifest.json")
    print(f"prepared: {arguments.out}")
    return DONE

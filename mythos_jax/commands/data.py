"""`mythos data prepare`, `mythos data show` and `mythos data shard`."""

import argparse
import json
import os
import sys
from typing import Annotated

from mythos_jax.bounds import Between, Ge, NonNegativeInt, PositiveInt, Wide
from mythos_jax.commands.arguments import add_json, of_type, path
from mythos_jax.config.data import Bytes, HeldOutFraction
from mythos_jax.data.shards import SHARD_BYTES
from mythos_jax.errors import DONE, ConfigError
from mythos_jax.streams import counted

SUMMARY = "Prepare text or conversations for training, and look at what came out."
PREPARE = "Turn text files, folders, JSON, CSV and Parquet into token rows."
SHOW = "Show one row of a prepared folder: its text, with what is trained on in [[ ]], sample by sample."

SHARD = "Write the rows of a prepared folder again, in files of another size."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_prepare(subparsers)
    _add_show(subparsers)
    _add_shard(subparsers)


def _add_prepare(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = subparsers.add_parser("prepare", help=PREPARE, description=PREPARE, allow_abbrev=False)
    # Suppressed default: a subparser's default would overwrite a --debug before `prepare`.
    prepare.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    prepare.add_argument(
        "sources", type=path, nargs="+", metavar="SRC", help='a file, a folder, the URL of one, or "stdlib"'
    )
    prepare.add_argument("--out", type=path, required=True, metavar="DIR", help="where the rows are written")
    prepare.add_argument(
        "--tokenizer",
        type=path,
        default="bytes",
        metavar="MODEL",
        help='a tokenizer.json, its folder, or a model: a directory, GGUF file, hub id or "smollm2" (default: "bytes")',
    )
    _add_chat(prepare)
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
        help='the text of JSON, CSV and Parquet records; several with commas are joined (default "text")',
    )
    prepare.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="a file or record that cannot be read: stop, and keep the finished work (default), or leave it out",
    )
    _add_sizes(prepare)
    _add_shard_bytes(prepare)
    prepare.add_argument(
        "--runner",
        nargs=argparse.REMAINDER,
        metavar="RUNNER …",
        help="do it on many machines, with this runner of Apache Beam (DirectRunner, DataflowRunner, FlinkRunner, "
        "SparkRunner) and its own flags; the last of the flags here, because all that follows is Beam's",
    )


def _add_sizes(prepare: argparse.ArgumentParser) -> None:
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


def _add_shard_bytes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-bytes",
        type=of_type(Annotated[int, Ge(1), Wide()]),
        default=SHARD_BYTES,
        metavar="N",
        help=f"a file of rows becomes about this large; the rows do not depend on it (default {SHARD_BYTES})",
    )


def _add_chat(prepare: argparse.ArgumentParser) -> None:
    prepare.add_argument(
        "--chat",
        action="store_true",
        help="the records are conversations (messages, or prompt and completion): train on the answers alone",
    )
    prepare.add_argument(
        "--chat-template", type=path, metavar="FILE", help="a Jinja template (default: the model's own)"
    )


def _add_show(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    show = subparsers.add_parser("show", help=SHOW, description=SHOW, allow_abbrev=False)
    show.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    show.add_argument("folder", type=path, metavar="DIR", help="a folder made by `mythos data prepare`")
    show.add_argument(
        "--row", type=of_type(NonNegativeInt), default=0, metavar="N", help="number of the row, from 0 (the default)"
    )
    show.add_argument("--split", choices=["train", "held_out"], default="train", help="default train")
    show.add_argument("--tokens", action="store_true", help="a line for each token: place, id, weight, segment, text")
    add_json(show)


def _add_shard(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    shard = subparsers.add_parser("shard", help=SHARD, description=SHARD, allow_abbrev=False)
    shard.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    shard.add_argument(
        "folder", type=path, metavar="DIR", help="a folder made by `mythos data prepare`, also of an earlier version"
    )
    shard.add_argument("--out", type=path, required=True, metavar="DIR", help="a new folder for the rows")
    _add_shard_bytes(shard)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    return {"prepare": _prepare, "show": _show, "shard": _shard}[arguments.data_command](arguments)


def _shard(arguments: argparse.Namespace) -> int:
    from mythos_jax.data.reshard import reshard

    manifest = reshard(arguments.folder, arguments.out, arguments.shard_bytes)
    for name, split in manifest.splits.items():
        print(f"{name}: {counted(split.rows, 'row')} in {counted(len(split.shards), 'file')}")
    print(f"prepared: {arguments.out}")
    return DONE


def _show(arguments: argparse.Namespace) -> int:
    from mythos_jax.data.show import show_row

    row = show_row(arguments.folder, arguments.split, arguments.row)
    if arguments.json:
        print(json.dumps(row.to_json(), ensure_ascii=False))
        return DONE
    counts = f"{row.trained:,} trained on, {len(row.ids) - row.trained:,} not, {row.padding:,} padding"
    print(f"{row.folder}, {row.split} row {row.number} of {row.rows:,}: {counted(len(row.ids), 'token')}: {counts}")
    if arguments.tokens:
        print(f"{'place':>6} {'id':>7} {'weight':>6} {'segment':>7}  text")
        for place, (number, text, weight, segment) in enumerate(row.tokens()):
            print(f"{place:6} {number:7} {weight:6g} {segment:7}  {json.dumps(text, ensure_ascii=False)}")
        return DONE
    segment = 0
    for run_segment, weight, text in row.runs():
        if run_segment != segment:
            print(f"{'' if segment == 0 else chr(10)}--- {'sample' if row.chat else 'document'} {run_segment}")
        segment = run_segment
        print(_marked(text, weight), end="")
    print()
    return DONE


def _marked(text: str, weight: float) -> str:
    """In double brackets, and green on a terminal with colours, if it is trained on."""
    if not weight:
        return text
    marked = f"[[{'' if weight == 1 else f'{weight:g}: '}{text}]]"
    return f"\x1b[32m{marked}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else marked


def _prepare(arguments: argparse.Namespace) -> int:
    from mythos_jax.data.chat_counts import describe
    from mythos_jax.data.prepare import prepare
    from mythos_jax.porting.hub import local_tokenizer

    if arguments.runner == []:
        raise ConfigError("--runner: got nothing, allowed: a runner of Apache Beam, such as DirectRunner")
    runner, *flags = arguments.runner or [""]
    if arguments.chat_template and not arguments.chat:
        raise ConfigError(f"--chat-template: got {arguments.chat_template}, allowed: only with --chat")
    manifest = prepare(
        arguments.sources,
        arguments.out,
        tokenizer=local_tokenizer(arguments.tokenizer),
        end_of_document=arguments.end_of_document,
        seq_len=arguments.seq_len,
        held_out_fraction=arguments.held_out_fraction,
        max_bytes=arguments.max_bytes,
        text_column=arguments.text_column,
        chat=arguments.chat,
        chat_template=arguments.chat_template or "",
        on_error=arguments.on_error,
        workers=arguments.workers,
        shard_bytes=arguments.shard_bytes,
        runner=runner,
        runner_flags=flags,
    )
    for name, split in manifest.splits.items():
        rows = counted(split.rows, "row")
        if manifest.chat is None:
            print(f"{name}: {rows}, {counted(split.tokens, 'token')}, {counted(split.documents, 'document')}")
        else:
            counts = describe(manifest.chat.splits[name])
            print(f"{name}: {rows}, {counted(split.documents, 'conversation')}, {counts}")
    if manifest.left_out_count:
        left_out = counted(manifest.left_out_count, "file or record", "files and records")
        print(f"left out: {left_out}, see {arguments.out}/manifest.json")
    print(f"prepared: {arguments.out}")
    return DONE

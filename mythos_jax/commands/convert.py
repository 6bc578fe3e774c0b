"""`mythos convert`."""

import argparse
import json

from mythos_jax.commands.arguments import add_base, add_json, path
from mythos_jax.errors import DONE, FAILED, WRONG_INPUT, ConfigError

SUMMARY = "Convert a model to another format, with a report on every tensor."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path,
        metavar="SRC",
        help="a run, a directory (also PEFT's), a file (.safetensors, .gguf, .pt and others), or a hub id",
    )
    parser.add_argument("target", type=path, metavar="DST", help="a directory that does not exist yet, or is empty")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="a format of docs/weights.md, such as mythos_jax or llama; peft: the low-rank weights of a LoRA run",
    )
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help="for a file that holds only tensors: a config.json, or one of our YAML files",
    )
    parser.add_argument(
        "--weights-key",
        metavar="KEY",
        help="which weights to read from a checkpoint of PyTorch that holds several, such as ema",
    )
    add_base(parser)
    parser.add_argument(
        "--check", action="store_true", help="also run the original and this implementation on the same tokens"
    )
    add_json(parser)
    parser.set_defaults(takes_overrides=("mesh",))


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.porting.convert import convert, format_report, report_as_json
    from mythos_jax.porting.reading import FileSource
    from mythos_jax.runs.adapters import FORMAT
    from mythos_jax.runs.configs import is_run
    from mythos_jax.runs.load import open_source
    from mythos_jax.runs.orbax_threads import quiet_background_errors

    if not arguments.debug:
        quiet_background_errors()
    if arguments.to == FORMAT:
        return _export_adapter(arguments, overrides)
    if arguments.weights_key is None:
        source = open_source(arguments.source, arguments.config, overrides, arguments.base)
    elif overrides or arguments.base or is_run(arguments.source):
        raise ConfigError(
            f"--weights-key: got {arguments.weights_key!r}, allowed only with a checkpoint of PyTorch, without --base "
            "and overrides"
        )
    else:
        source = FileSource(arguments.source, arguments.config, weights_key=arguments.weights_key)
    report = convert(
        source,
        arguments.target,
        arguments.to,
        check=arguments.check,
        progress=not arguments.json,
    )
    print(json.dumps(report_as_json(report)) if arguments.json else format_report(report))
    if report.coverage.problems:
        return WRONG_INPUT
    return DONE if report.ok else FAILED


def _export_adapter(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.runs.adapters import export_adapter

    for name in ("base", "check", "config", "weights_key"):
        if getattr(arguments, name):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag}: got {getattr(arguments, name)}, allowed: none with --to {arguments.to}")
    report = export_adapter(arguments.source, arguments.target, overrides)
    print(json.dumps(report.as_dict()) if arguments.json else report.as_text())
    return DONE

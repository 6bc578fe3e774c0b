"""`mythos info`: a model in numbers."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mythos_jax.bounds import PositiveInt
from mythos_jax.commands.arguments import of_type, path
from mythos_jax.errors import DONE, ConfigError
from mythos_jax.runs.records import CONFIG_FILE

if TYPE_CHECKING:
    from mythos_jax.config import Config

SUMMARY = "Parameters, FLOPs per token by number of loops, and cache bytes per token."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path, metavar="CONFIG|RUN|MODEL")
    parser.add_argument(
        "--context",
        type=of_type(PositiveInt),
        metavar="N",
        help="keys each token attends to, for FLOPs (default: max_seq_len / 2)",
    )
    parser.set_defaults(takes_overrides=True)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    print(describe(_config(arguments.config, overrides), arguments.context))
    return DONE


def _config(source: str, overrides: list[str]) -> "Config":
    """Of a pretrained model, only the name and the model are meaningful."""
    from mythos_jax.config import Config, DataConfig, load_run_config, named_config
    from mythos_jax.porting.adapted import open_pretrained
    from mythos_jax.porting.hub import PACKAGED
    from mythos_jax.runs.configs import load_config

    directory = Path(source)
    if directory.is_dir() and (directory / CONFIG_FILE).is_file():
        return load_run_config(directory / CONFIG_FILE, overrides)
    is_word = "/" not in source and not directory.exists() and source not in PACKAGED
    if directory.suffix in (".yaml", ".yml") or named_config(source) or is_word:
        return load_config(source, overrides)
    if overrides:
        raise ConfigError(f"{source}: is a pretrained model, got {overrides[0]}; allowed only with a config or a run")
    pretrained = open_pretrained(source)
    return Config(name=pretrained.path.stem, model=pretrained.config, data=DataConfig(seq_len=1))


def describe(config: "Config", context: int | None = None) -> str:
    """Parameters, FLOPs per token by number of loops, and cache bytes per token, as text.

    context: keys that each token attends to (default: half of max_seq_len, the mean of a full causal sequence).
    """
    from mythos_jax.flops import cache_bytes, count_parameters, forward_flops, trained_parts
    from mythos_jax.model.layers import compute_dtype

    model = config.model
    context = context or model.max_seq_len // 2
    flops = forward_flops(model, context)
    depths = sorted({*(2**i for i in range((2 * model.loops).bit_length())), model.loops})
    lines = [
        f"{config.name}: {model.prelude_layers} + {model.loop_layers} x loops + {model.coda_layers} layers, "
        f"width {model.dim}, {model.attention}, {model.feed_forward}",
        f"parameters: {count_parameters(model):,}",
        *_trained(config),
        f"activations: {compute_dtype(model)}",
        "",
        f"{'loops':>6} {'forward FLOPs/token':>20} {'training FLOPs/token':>21} {'cache bytes/token':>18}",
    ]
    for loops in depths:
        mark = " (default)" if loops == model.loops else ""
        training = trained_parts(config, context).at(loops)
        lines.append(f"{loops:>6} {flops.at(loops):>20,} {training:>21,} {cache_bytes(model, loops):>18,}{mark}")
    lines.append(f"\nFLOPs: {context:,} keys per token, a multiply-add counts as two. Cache: one slot per loop.")
    return "\n".join(lines)


def _trained(config: "Config") -> list[str]:
    """What a LoRA run trains."""
    from mythos_jax.flops import low_rank_sizes

    sizes, rank = low_rank_sizes(config), config.training.lora.rank
    if not sizes:
        return []
    return [f"trained: {sum(sizes.values()):,} low-rank weights of rank {rank} beside {len(sizes)} matrices"]

"""What PEFT's `adapter_config.json` says, as far as it is computed here; the rest is refused by its name."""

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.paths import read_json
from mythos_jax.porting.fields import Fields

CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"
HEAD = "lm_head"  # which `all-linear` leaves out

HANDLED = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "bias",
)
# Any value is accepted: they say how an adapter was trained, or belong to a feature that is off.
UNUSED = (
    "auto_mapping",
    "eva_config",
    "fan_in_fan_out",  # PEFT itself takes it for false where a linear map is [out, in]
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
)
# What these turn on is not supported.
OFF = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# The ways of initialising that leave the base as it is; others, such as pissa, change it when PEFT loads an adapter.
INITIAL_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal")
MOST_REPETITIONS = 4  # of a regular expression that a file brings
LONGEST_PATTERN = 1000


@dataclass(frozen=True)
class AdapterConfig:
    """What an `adapter_config.json` says. where: names the file in errors; base: the model that it was trained on;
    revision: of that model on the hub. targets, excluded: names of modules or their ends, or one regular expression.
    layers: the layers that are adapted (empty: all). layers_pattern: names of the lists of layers (empty: any)."""

    where: str
    base: str | None
    revision: str | None
    rank: int
    alpha: float
    targets: tuple[str, ...] | re.Pattern[str]
    excluded: tuple[str, ...] | re.Pattern[str] = ()
    layers: tuple[int, ...] = ()
    layers_patterns: tuple[re.Pattern[str], ...] = ()
    rank_stabilized: bool = False
    ranks: Mapping[re.Pattern[str], int] = field(default_factory=dict)
    alphas: Mapping[re.Pattern[str], float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        return next((rank for pattern, rank in self.ranks.items() if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of B and A is multiplied with."""
        alpha = next((alpha for pattern, alpha in self.alphas.items() if pattern.match(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def adapts(self, module: str) -> bool:
        """Whether PEFT gives a module low-rank weights, by the rules of its `check_target_module_exists`."""
        if _names(self.excluded, module):
            return False
        if isinstance(self.targets, re.Pattern):
            return self.targets.fullmatch(module) is not None
        if self.targets == (ALL_LINEAR,):
            return module != HEAD
        if module in self.targets:
            return True
        return _names(self.targets, module) and (not self.layers or self._layer_of(module) in self.layers)

    def _layer_of(self, module: str) -> int | None:
        if not self.layers_patterns:
            match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)
        else:
            found = (re.match(pattern, module) for pattern in self.layers_patterns)
            match = next((one for one in found if one is not None), None)
        return int(match["index"]) if match else None


def _names(chosen: tuple[str, ...] | re.Pattern[str], module: str) -> bool:
    """Whether one of these is the name of a module or its end, or the expression matches the whole name."""
    if isinstance(chosen, re.Pattern):
        return chosen.fullmatch(module) is not None
    return module in chosen or any(module.endswith(f".{name}") for name in chosen)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Raises ConfigError, naming the file and the field, for what is not LoRA as it is computed here."""
    where = str(directory / CONFIG_FILE)
    given = read_json(directory / CONFIG_FILE)
    fields = Fields(given, where, (*HANDLED, *UNUSED, *OFF))
    fields.refuse_unknown()
    fields.expect_off(OFF)
    fields.choice("peft_type", ("LORA",))
    if given.get("task_type") is not None:
        fields.choice("task_type", ("CAUSAL_LM",))
    fields.expect({"bias": "none"})
    initial = given.get("init_lora_weights")
    if not any(initial is known or (isinstance(known, str) and initial == known) for known in INITIAL_WEIGHTS):
        raise ConfigError(
            f"{where}: init_lora_weights: got {initial!r}, allowed: true, false, gaussian, eva, orthogonal, since "
            "others change the base (PEFT's save_pretrained can convert such an adapter)"
        )
    rank = fields.integer("r", 8, low=1)
    return AdapterConfig(
        where=where,
        base=_text(fields, "base_model_name_or_path"),
        revision=_text(fields, "revision"),
        rank=rank,
        alpha=fields.number("lora_alpha", 8),
        targets=_modules(fields, "target_modules"),
        excluded=_modules(fields, "exclude_modules"),
        layers=_layers(fields),
        layers_patterns=tuple(
            _pattern(f"{where}: layers_pattern", name, rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.")
            for name in _strings(fields, "layers_pattern")
        ),
        rank_stabilized=fields.boolean("use_rslora", False),
        ranks={pattern: inner.integer(name, low=1) for pattern, inner, name in _patterns(fields, "rank_pattern")},
        alphas={pattern: inner.number(name) for pattern, inner, name in _patterns(fields, "alpha_pattern")},
    )


def _text(fields: Fields, name: str) -> str | None:
    value = fields.given.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{fields.where}: {name}: got {value!r}, allowed: a text, or null")
    return value or None


def _strings(fields: Fields, name: str) -> tuple[str, ...]:
    """A text, or a list of them; empty if it is absent or null."""
    value = fields.given.get(name)
    values = [value] if isinstance(value, str) else fields.sequence(name)
    if not all(isinstance(item, str) and item for item in values):
        raise ConfigError(f"{fields.where}: {name}: got {value!r}, allowed: a text, or a list of texts")
    return tuple(values)


def _modules(fields: Fields, name: str) -> tuple[str, ...] | re.Pattern[str]:
    value = fields.given.get(name)
    if isinstance(value, str) and value and value.lower() != ALL_LINEAR:
        return _pattern(f"{fields.where}: {name}", value, value)
    return tuple(text.lower() if isinstance(value, str) else text for text in _strings(fields, name))


def _layers(fields: Fields) -> tuple[int, ...]:
    value = fields.given.get("layers_to_transform")
    values = [value] if isinstance(value, int) else fields.sequence("layers_to_transform")
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise ConfigError(f"{fields.where}: layers_to_transform: got {value!r}, allowed: an integer, or a list of them")
    return tuple(values)


def _patterns(fields: Fields, name: str) -> Iterable[tuple[re.Pattern[str], Fields, str]]:
    """The expressions of an object of them, each with the fields that its value is in, and its name there."""
    given = fields.given.get(name) or {}
    inner = fields.section(name, given if isinstance(given, Mapping) else ())
    for text in inner.given:
        yield _pattern(f"{fields.where}: {name}", text, rf"(.*\.)?({text})$"), inner, text


def _pattern(where: str, text: str, whole: str) -> re.Pattern[str]:
    """A regular expression of a file, as part of a `whole` one. Raises ConfigError if it is none, and for one that
    could take forever: with many repetitions, or with one inside another."""
    plain = re.sub(r"\\.", "", text)
    slow = len(re.findall(r"[*+{]", plain)) > MOST_REPETITIONS or re.search(r"\)[*+{]", plain)
    if slow or len(text) > LONGEST_PATTERN:
        raise ConfigError(
            f"{where}: got {one_line(text, 80)!r}, allowed: a regular expression with at most {MOST_REPETITIONS} "
            "repetitions, none of a group"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that later versions of Python may read otherwise
            return re.compile(whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: got {one_line(text, 80)!r}, allowed: a regular expression ({error})") from None


def config_fields(targets: list[str], rank: int, alpha: float, base: str) -> dict[str, Any]:
    """The contents of `adapter_config.json`; what is left out here has its default in every version of PEFT."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def target_names(adapted: Collection[str], modules: Iterable[str]) -> list[str]:
    """A `target_modules` that names exactly the adapted ones of these modules: last parts of names, such as q_proj,
    where every module that ends so is adapted, else whole names."""
    partly = {_end(name) for name in modules if name not in adapted}
    ends = {_end(name) for name in adapted} - partly
    return [*sorted(ends), *sorted(name for name in adapted if _end(name) in partly)]


def _end(module: str) -> str:
    return module.rpartition(".")[2]

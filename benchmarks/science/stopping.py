"""The models that benchmarks.science.exits compares, and how each is trained and measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.exact_match import SMOKE, TASKS
from benchmarks.science.frame import TEXT
from benchmarks.science.sampled_depth import FIXED as ARM
from benchmarks.science.sampled_depth import SAMPLED
from benchmarks.sweeps import Curve, criteria_of, curve, evaluation_rows, with_predictor
from mythos_jax.config import Config
from mythos_jax.config.training import DepthConfig
from mythos_jax.runs.load import LoadedModel, load_model
from mythos_jax.training.train import train

PREFIX = "exits "  # of the names of results; without it, they are those of the runs
WEIGHT = 0.1  # of the priors: Ouro's, which is the default for gates
Models = dict[str, tuple[str, list[str]]]  # name -> name of the run, and overrides of the problem's config


class Problem(NamedTuple):
    """What is learned. budgets: mean loops. field: of a point. rows: to measure on, half of them to choose thresholds
    on; of a task, of each difficulty."""

    base: Path
    models: Callable[[str], Models]
    budgets: tuple[float, ...]
    field: str
    rows: int


def with_exits(rate: float) -> dict[str, tuple[str, ...]]:
    """Overrides of the models that learn to stop. rate: of the geometric priors."""
    gate = ("--model.exit_gate=true", "--training.objectives.exit_loss=expected")
    act = ("--model.readout=act", f"--training.objectives.ponder_prior={WEIGHT}")
    return {
        "gate, uniform prior": gate,
        "ACT, uniform prior": (*act, "--training.objectives.ponder_prior_rate=0"),
        "ACT, geometric prior": (*act, f"--training.objectives.ponder_prior_rate={rate}"),
        "gate, geometric prior": (*gate, f"--training.objectives.exit_prior_rate={rate}"),
    }


def text_models(size: str) -> Models:
    arms = {"random depth": SAMPLED}
    arms |= {name: replace(ARM, more=(f", {name}", words)) for name, words in with_exits(0.5).items()}
    return {name: (arm.name(size), arm.words(size)) for name, arm in arms.items()}


# Overrides of configs/tasks/group.yaml, by size.
GROUP = {
    "cpu": (),
    "gpu": ("--model.dim=128", "--model.n_heads=4", "--model.n_kv_heads=4", "--model.hidden_dim=352"),
    "smoke": SMOKE,
}


def group_models(size: str) -> Models:
    """With a layer before the loop: a predictor sees nothing else."""
    shape = ["--model.prelude_layers=1", *GROUP[size]]
    models: Models = {"last loop": ("group", shape)}
    return models | {name: (f"group, {name}", [*shape, *words]) for name, words in with_exits(0.2).items()}


PROBLEMS = {
    "text": Problem(TEXT, text_models, (1.5, 2.0, 2.5, 3.0), "nats", 256),
    "group": Problem(TASKS / "group.yaml", group_models, (2.0, 3.0, 4.5, 6.0, 9.0), "right", 64),
}


def second_stage(config: Config) -> Config:
    """Of a gate alone, on the frozen model."""
    t = config.training
    objectives = replace(t.objectives, exit_loss="gain")
    t = replace(t, objectives=objectives, depth=DepthConfig(), optimizer="adamw", learning_rate=1e-2)
    t = replace(t, steps=150, warmup_steps=10)
    return replace(config, model=replace(config.model, exit_gate=True), training=t)


def opened(run: Path, config: Config) -> LoadedModel:
    """A finished run, with its data where `config` has it: the run may have been trained from another folder."""
    loaded = load_model(run)
    return replace(loaded, config=replace(loaded.config, data=config.data))


def train_and_stop(config: Config, workdir: Path, rows: int) -> dict[str, Curve]:
    """Trains the model, then on the frozen model a predictor and a gate; measures every way to stop it."""
    trained = workdir.with_name(workdir.name.removeprefix("exits_"))
    train(config, trained)
    depth = config.model.loops
    loaded = with_predictor(opened(trained, config), depth)
    batch = evaluation_rows(loaded, rows)
    curves = {criterion: curve(loaded, batch, depth, criterion) for criterion in criteria_of(loaded)}
    if config.model.readout == "act":
        return curves
    gated = trained.with_name(f"{trained.name}_stage_2")
    train(second_stage(config), gated, init_from=trained)
    second = curve(opened(gated, config), batch, depth, "gate")
    first = curves.pop("gate", None)
    if first is None:
        return {**curves, "gate, stage II alone": second}
    return {**curves, "gate, stage I": first, "gate, stages I + II": second}

"""`mythos train-predictor`: records how a model's predictions settle with depth, and trains a head to predict it.

The label of a token is KL(final || after t loops) of its next-token distribution, for every t: of the exits that a
zero-shot criterion would take it knows what each would have cost, so one head serves every budget. It needs no
targets, and is what leaving early costs in expectation if the final distribution is right; the token's own loss would
be the same in the mean with far more noise.
"""

import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save
from tqdm import tqdm

from mythos_jax.data.open import open_data
from mythos_jax.data.placement import place_batch
from mythos_jax.errors import ConfigError
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.predictor import COLLECTION, PRICES, init_head, log_excess, loops_at
from mythos_jax.paths import to_path
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import use_mesh

HIDDEN, STEPS, BATCH, LEARNING_RATE = 128, 3000, 1024, 3e-3
CALIBRATION = 0.2  # share of the recorded tokens that the budgets are measured on
TOLERANCE = 0.005  # the predictor's own budget costs at most this share of the final loss


def make_predictor(loaded: LoadedModel, *, loops: int | None = None, rows: int = 512, progress: bool = True) -> dict:
    """Records `rows` rows of the run's training data at 1 to `loops` loops (default: the config's), trains a
    predictor on them and saves it in the run's directory. Returns what its JSON says.

    Raises ConfigError: no run, ACT read-out (it has learned halting of its own), fewer than 2 loops.
    """
    config, loops = loaded.config, loops or loaded.config.model.loops
    if loaded.step is None:
        raise ConfigError(f"{loaded.directory}: a pretrained model has no data of its own; allowed: a run directory")
    if config.model.readout == "act":
        raise ConfigError("predictor: got a model with readout act, which decides by itself; allowed: readout last")
    if loops < 2:
        raise ConfigError(f"loops: got {loops}, allowed: an integer >= 2, for there to be a choice")
    features, excess, nats = record_exits(loaded, loops, rows, progress)
    count = int(len(features) * (1 - CALIBRATION))
    head = fit(features[:count], excess[:count])
    predictor, table = calibrate(head, features[count:], excess[count:], float(nats.mean()))
    about = {"step": loaded.step, "loops": loops, "rows": rows, "tokens": len(features), **table}
    save_predictor(loaded.directory, predictor, about)
    return about


def record_exits(
    loaded: LoadedModel, loops: int, rows: int, progress: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each token that has a target: the prelude's output [N, D], KL(final || after t loops) in nats [N, loops - 1],
    and nats of the target at `loops` loops [N]. Rows are those of the run's first batches."""
    config, size = loaded.config, loaded.config.training.batch_size
    batches: Iterator[Any] = open_data(config, progress=progress).train_batches(
        batch_size=size, seed=config.training.seed
    )
    parts = []
    with use_mesh(loaded.mesh):
        for batch in tqdm(
            islice(batches, -(-rows // size)), total=-(-rows // size), desc="exits", disable=not progress
        ):
            placed = place_batch(loaded.mesh, batch)
            found = jax.device_get(_exits(loaded.model, loaded.variables, placed, loops))
            parts.append([x[np.asarray(batch["mask"], bool)] for x in found])
    return tuple(np.concatenate(x) for x in zip(*parts, strict=True))


@partial(jax.jit, static_argnames=("model", "most"))
def _exits(model: Mythos, variables: Any, batch: Any, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `record_exits`, [B, T, ...] of one batch; one compiled loop body, and the logits of one depth at a time."""

    def at(loops):
        nats_BT, out = token_loss(model, variables, batch, loops=loops, rngs={"state": jax.random.key(0)})
        return nats_BT, out, jax.nn.log_softmax(model.apply(variables, out.features, method="head"))

    nats_BT, out, final_BTV = at(jnp.int32(most))

    def excess(loops):
        return jnp.sum(jnp.exp(final_BTV) * (final_BTV - at(loops)[2]), axis=-1)

    excess_LBT = jax.lax.map(excess, jnp.arange(1, most))
    return out.aux.injected_BTD.astype(jnp.float32), jnp.maximum(jnp.moveaxis(excess_LBT, 0, -1), 0), nats_BT


@partial(jax.jit, static_argnames="steps")
def fit(features_ND: jax.Array, excess_NL: jax.Array, steps: int = STEPS) -> dict[str, jax.Array]:
    """Trains a head. The Poisson deviance makes it predict the mean of labels that span many orders of magnitude."""
    features_ND, excess_NL = jnp.asarray(features_ND), jnp.asarray(excess_NL)
    (N, D), key = features_ND.shape, jax.random.key(0)
    head = init_head(key, D, HIDDEN, excess_NL.shape[1] + 1)
    head["out_bias"] = jnp.log(excess_NL.mean(0) + 1e-9)  # the best constant
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def loss(head, rows):
        predicted = log_excess(head, features_ND[rows])
        return jnp.mean(jnp.exp(predicted) - excess_NL[rows] * predicted)

    def step(state, i):
        head, inner = state
        rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, N)
        updates, inner = optimizer.update(jax.grad(loss)(head, rows), inner)
        return (optax.apply_updates(head, updates), inner), None

    return jax.lax.scan(step, (head, optimizer.init(head)), jnp.arange(steps))[0][0]


def calibrate(
    head: dict[str, jax.Array], features_ND: np.ndarray, excess_NL: np.ndarray, nats: float
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Measures, on tokens that the head was not trained on, the mean loops at each price and what they cost.

    Returns the whole predictor and a table of it. Its own budget is the smallest that costs at most `TOLERANCE` of
    the final loss, `nats` a token.
    """
    predicted = jnp.exp(log_excess(head, features_ND))
    costs = np.pad(excess_NL, ((0, 0), (0, 1)))
    loops_PN = np.asarray(jax.lax.map(partial(loops_at, predicted), jnp.asarray(PRICES)))
    mean_P = loops_PN.mean(1, dtype=np.float64)
    cost_P = np.array([np.take_along_axis(costs, loops[:, None] - 1, axis=1).mean() for loops in loops_PN])
    # Rounded up, so that a mean that is the budget is within it in float32 too.
    mean_loops = np.minimum.accumulate(np.nextafter(mean_P.astype(np.float32), np.float32(np.inf)))
    budget = mean_loops[cost_P <= TOLERANCE * nats].min(initial=mean_loops[0])
    predictor = {name: np.asarray(value, np.float32) for name, value in head.items()}
    predictor |= {"prices": PRICES, "mean_loops": mean_loops, "budget": np.asarray(budget, np.float32)}
    every = range(0, len(PRICES), 16)
    return predictor, {
        "budget": round(float(budget), 3),
        "final_nats": round(nats, 4),
        "mean_loops": [round(float(mean_P[i]), 3) for i in every],
        "excess_nats": [round(float(cost_P[i]), 5) for i in every],
    }


def save_predictor(directory: Path, predictor: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    folder = to_path(directory) / COLLECTION
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictor.safetensors").write_bytes(save(predictor))
    (folder / "predictor.json").write_text(json.dumps(about, indent=1) + "\n")

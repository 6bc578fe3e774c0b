"""Trains a depth predictor for a trained model: `mythos train-predictor`.

Records how the model's next-token distributions converge with depth, then trains a small head that predicts this from
the prelude's output (see `model/predictor.py`, which uses the head).

The label of a token is KL(final || after t loops) of its next-token distribution, for every t. It measures the cost of
every possible exit, so one head serves every budget. It needs no targets: if the final distribution is right, it is
the expected increase of the token's loss. The measured increase has the same expectation but much higher variance.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save

from mythos_jax.data.open import Data, PreparedData, open_data
from mythos_jax.data.placement import fitting_batch, place_batch
from mythos_jax.errors import ConfigError
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.predictor import PREDICTOR, PRICES, init_head, log_excess, loops_at
from mythos_jax.model.state import Output
from mythos_jax.paths import to_path, write_whole
from mythos_jax.progress import Progress
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import use_mesh

HIDDEN, STEPS, BATCH, LEARNING_RATE = 128, 3000, 1024, 3e-3
CALIBRATION = 0.2  # fraction of the recorded tokens that the budgets are measured on
TOLERANCE = 0.005  # the predictor's own budget increases the final loss by at most this fraction


def train_predictor(
    loaded: LoadedModel, *, loops: int | None = None, rows: int = 512, progress: bool = True
) -> dict[str, Any]:
    """Trains a predictor of the exits from 1 to `loops` loops (default: the config's) on `rows` rows of the run's
    training data, and saves it in the run's directory. Returns the contents of its JSON file.

    Raises ConfigError: not a run, a model with ACT read-out (which has learned when to halt), fewer than 2 loops.
    """
    config, loops = loaded.config, loops or loaded.config.model.loops
    if loaded.step is None:
        raise ConfigError(f"{loaded.directory}: a pretrained model has no data of its own; allowed: a run directory")
    if config.model.readout == "act":
        raise ConfigError("predictor: got a model with readout act, which has learned to halt; allowed: readout last")
    if loops < 2:
        raise ConfigError(f"loops: got {loops}, allowed: an integer >= 2")
    features_ND, excess_NL, loss_N = record_exits(loaded, loops, rows, progress)
    # The budgets are measured on other tokens than the head is trained on.
    split = int(len(features_ND) * (1 - CALIBRATION))
    head = fit(features_ND[:split], excess_NL[:split])
    predictor, table = calibrate(head, features_ND[split:], excess_NL[split:], float(loss_N.mean()))
    summary = {"step": loaded.step, "loops": loops, "rows": rows, "tokens": len(features_ND), **table}
    save_predictor(loaded.directory, predictor, summary)
    return summary


def record_exits(
    loaded: LoadedModel, loops: int, rows: int, progress: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs the model on the first rows of its training data at every depth.

    Returns, for each of the N tokens that have a target, float32: the prelude's output [N, D], KL(final || after t
    loops) in nats [N, loops - 1], and the loss at `loops` loops in nats [N].
    """
    config = loaded.config
    wanted = -(-rows // config.training.batch_size) * config.training.batch_size
    size = fitting_batch(loaded.mesh, config.training.batch_size)
    count = -(-wanted // size)
    data = _open_data(loaded, progress)
    batches: Iterator[Any] = data.train_batches(batch_size=size, seed=config.training.seed)
    recorded = []
    with use_mesh(loaded.mesh), Progress(count, "exits", "row", show=progress) as bar:
        for i, batch in enumerate(islice(batches, count)):
            placed = place_batch(loaded.mesh, batch)
            arrays = jax.device_get(_exits(loaded.model, loaded.variables, placed, loops))
            used_BT = np.array(batch["mask"], bool)
            used_BT[wanted - i * size :] = False
            recorded.append([array_BT[used_BT] for array_BT in arrays])
            bar.update()
    features_ND, excess_NL, loss_N = (np.concatenate(parts) for parts in zip(*recorded, strict=True))
    return features_ND, excess_NL, loss_N


def _open_data(loaded: LoadedModel, progress: bool) -> Data:
    """The data that the run was trained on. Raises ConfigError if it is missing, or was prepared anew otherwise."""
    if not loaded.config.data.task.name:
        loaded.own_folders()
    data = open_data(loaded.data_config, progress=progress, prepare=False, resumes=True)
    if isinstance(data, PreparedData):
        for folder, manifest in data.manifests.items():
            loaded.trained_on.check_rows(manifest, folder, loaded.config.data.seq_len)
    return data


@partial(jax.jit, static_argnames=("model", "max_loops"))
def _exits(model: Mythos, variables: Any, batch: Any, max_loops: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `record_exits` returns, for one batch and all of its tokens: [B, T, ...].

    The depth is traced, so the loop is compiled once, and the logits of one depth are held at a time.
    """

    def at(loops: jax.Array) -> tuple[jax.Array, Output, jax.Array]:
        loss_BT, out = token_loss(model, variables, batch, loops=loops, rngs={"state": jax.random.key(0)})
        logits_BTV = cast(jax.Array, model.apply(variables, out.features, method="head"))
        return loss_BT, out, jax.nn.log_softmax(logits_BTV)

    loss_BT, out, final_BTV = at(jnp.int32(max_loops))

    def excess(loops: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(final_BTV) * (final_BTV - at(loops)[2]), axis=-1)

    excess_LBT = jax.lax.map(excess, jnp.arange(1, max_loops))
    # Rounding can make a KL that is nearly zero negative.
    return out.aux.injected_BTD.astype(jnp.float32), jnp.maximum(jnp.moveaxis(excess_LBT, 0, -1), 0), loss_BT


@partial(jax.jit, static_argnames="steps")
def fit(features_ND: jax.Array, excess_NL: jax.Array, steps: int = STEPS) -> dict[str, jax.Array]:
    """Trains a head on what `record_exits` recorded, with Adam.

    The loss is the Poisson deviance, so that the head predicts the mean of labels that span many orders of magnitude.
    """
    features_ND, excess_NL = jnp.asarray(features_ND), jnp.asarray(excess_NL)
    (N, D), key = features_ND.shape, jax.random.key(0)
    head = init_head(key, D, HIDDEN, excess_NL.shape[1] + 1)
    head["out_bias"] = jnp.log(excess_NL.mean(0) + 1e-9)  # the best constant prediction
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def loss(head: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
        predicted = log_excess(head, features_ND[rows])
        return jnp.mean(jnp.exp(predicted) - excess_NL[rows] * predicted)

    def step(state: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], None]:
        head, optimizer_state = state
        rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, N)
        updates, optimizer_state = optimizer.update(jax.grad(loss)(head, rows), optimizer_state)
        return (optax.apply_updates(head, updates), optimizer_state), None

    (head, _), _ = jax.lax.scan(step, (head, optimizer.init(head)), jnp.arange(steps))
    return head


def calibrate(
    head: dict[str, jax.Array], features_ND: np.ndarray, excess_NL: np.ndarray, final_loss: float
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Measures, on tokens that the head was not trained on, the mean loops at each price and what they cost.

    Returns the complete predictor and a summary of the measurements. The predictor's own budget is the smallest that
    increases `final_loss`, in nats per token, by at most the fraction `TOLERANCE`.
    """
    predicted_NL = jnp.exp(log_excess(head, jnp.asarray(features_ND)))
    costs_NL = np.pad(excess_NL, ((0, 0), (0, 1)))  # the last loop costs nothing
    loops_PN = np.asarray(jax.lax.map(partial(loops_at, predicted_NL), jnp.asarray(PRICES)))
    mean_P = loops_PN.mean(1, dtype=np.float64)
    cost_P = np.array([np.take_along_axis(costs_NL, loops_N[:, None] - 1, axis=1).mean() for loops_N in loops_PN])
    # Rounded up, so that a budget equal to a mean also admits it in float32.
    mean_loops = np.minimum.accumulate(np.nextafter(mean_P.astype(np.float32), np.float32(np.inf)))
    budget = mean_loops[cost_P <= TOLERANCE * final_loss].min(initial=mean_loops[0])
    predictor = {name: np.asarray(value, np.float32) for name, value in head.items()}
    predictor |= {"prices": PRICES, "mean_loops": mean_loops, "budget": np.asarray(budget, np.float32)}
    shown = range(0, len(PRICES), 16)
    return predictor, {
        "budget": round(float(budget), 3),
        "final_nats": round(final_loss, 4),
        "mean_loops": [round(float(mean_P[i]), 3) for i in shown],
        "excess_nats": [round(float(cost_P[i]), 5) for i in shown],
    }


def save_predictor(directory: Path, predictor: dict[str, np.ndarray], summary: dict[str, Any]) -> None:
    """Writes `predictor/predictor.safetensors` and `predictor/predictor.json` into a run's directory."""
    folder = to_path(directory) / PREDICTOR
    folder.mkdir(parents=True, exist_ok=True)
    weights = save(predictor)
    summary = {**summary, "sha256": hashlib.sha256(weights).hexdigest()}
    write_whole(folder / "predictor.safetensors", weights)
    write_whole(folder / "predictor.json", (json.dumps(summary, indent=1) + "\n").encode())

"""Which setting to change if a program does not fit."""

from mythos_jax.config import Config
from mythos_jax.preflight.compile import Program
from mythos_jax.preflight.topology import Topology


def advise(config: Config, program: Program, hbm: dict[str, float], topology: Topology, decode: bool) -> str:
    """Which setting to change first, if the program does not fit."""
    capacity, training = topology.chip.hbm_bytes, config.training
    if decode and hbm["cache"] > hbm["parameters"]:
        return f"the cache is too large: lower evaluation.batch_size ({config.evaluation.batch_size}) or data.seq_len"
    # Gradients take as much memory as the parameters.
    if sum(hbm.values()) + (0 if decode else hbm["parameters"]) > 0.8 * capacity:
        return "the state alone is too large: use more chips, or shard the weights further (mesh.fsdp, mesh.expert)"
    if decode:
        return "the temporaries are too large: lower evaluation.batch_size, or raise mesh.tensor"
    if config.model.remat != "full":
        return f"set model.remat to full (it is {config.model.remat})"
    batch_shards = program.mesh.size // (program.mesh.shape["tensor"] * program.mesh.shape["sequence"])
    parts = training.grad_accumulation_steps
    rows = training.batch_size // parts // batch_shards
    if rows > 1:
        return f"set training.grad_accumulation_steps to {parts * rows} (each chip processes {rows} rows at a time)"
    return "each chip already processes one row at a time: raise mesh.tensor or mesh.sequence, or use more chips"

"""Which setting to change if a program does not fit."""

from mythos_jax.chips import GIB
from mythos_jax.config import Config, gathers_per_loop
from mythos_jax.preflight.buffers import Buffer, held
from mythos_jax.preflight.program import Program
from mythos_jax.preflight.topology import Topology


def advise(
    config: Config,
    program: Program,
    state: dict[str, float],
    biggest: list[Buffer],
    topology: Topology,
    decode: bool,
) -> str:
    """What fills the memory, and which setting to change first. state: bytes per chip by part. biggest: all buffers at
    the peak; empty if the compiler did not say."""
    capacity = topology.chip.hbm_bytes
    if decode and state["cache"] > state["parameters"]:
        return f"the cache is too large: lower evaluation.batch_size ({config.evaluation.batch_size}) or data.seq_len"
    # Gradients take as much memory as the parameters.
    if sum(state.values()) + (0 if decode else state["parameters"]) > 0.8 * capacity:
        return "the state alone is too large: use more chips, or shard the weights further (mesh.fsdp, mesh.expert)"
    if decode:
        return "the temporaries are too large: lower evaluation.batch_size, or raise mesh.tensor"
    cause = next(((name, size) for name, size in held(biggest).items() if name in _CAUSES), None)
    if cause is None:
        return _fewer_rows(config, program)
    name, size = cause
    largest = next(b for b in biggest if b.holds == name)
    fills = f"{_CAUSES[name]} take {size / GIB:.1f} GiB, most of all {_describe(largest)}"
    if name == "gathered weights" and not gathers_per_loop(config) and config.model.remat != "none":
        return f"{fills}: set mesh.gather to per_loop (it is {config.mesh.gather})"
    return f"{fills}: {_fewer_rows(config, program)}"


# What the advice calls what buffers hold.
_CAUSES = {
    "gathered weights": "weights gathered along fsdp",
    "forward pass": "values that the forward pass leaves for the backward pass",
    "recomputed": "values that the backward pass computes again",
    "backward pass": "values of the backward pass",
}


def _describe(buffer: Buffer) -> str:
    origin = " ".join(text for text in (buffer.part, buffer.source) if text)
    return f"{buffer.count} x {buffer.type} of {origin}" if origin else f"{buffer.count} x {buffer.type}"


def _fewer_rows(config: Config, program: Program) -> str:
    training = config.training
    if config.model.remat != "full":
        return f"set model.remat to full (it is {config.model.remat})"
    batch_shards = program.mesh.size // (program.mesh.shape["tensor"] * program.mesh.shape["sequence"])
    parts = training.grad_accumulation_steps
    rows = training.batch_size // parts // batch_shards
    if rows > 1:
        return f"raise training.grad_accumulation_steps ({parts}; each chip processes {rows} rows at a time)"
    return "each chip already processes one row at a time: raise mesh.tensor or mesh.sequence, or use more chips"

"""What `mythos retrofit` says: layer by layer, how far the logits are from the source's, what training costs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.retrofit.comparison import TOLERANCE, Comparison
from mythos_jax.retrofit.cut import PARTS, dense_layers, describe
from mythos_jax.retrofit.surgery import Plan, Retrofit
from mythos_jax.retrofit.training import UTILISATION, Cost

ENTERS = {
    "input": "the prelude's output alone enters the loop: adapter [0 | I]; what the state adds is learned from zero",
    "add": "the sum of the state and the prelude's output enters the loop: adapter [I | I]",
    "random": "state and prelude's output enter the loop through a random matrix, as in the published models",
    "none": "the state alone enters the loop: no adapter; the first loop starts from the prelude's output",
}
STARTS = {"zeros": "zeros", "noise": "noise", "injected": "the prelude's output"}


@dataclass(frozen=True)
class RetrofitReport:
    """out: the new directory. comparison: None if it was not asked for."""

    out: Path
    plan: Plan
    dense: ModelConfig
    result: Retrofit
    comparison: Comparison | None
    cost: Cost

    def wrong_depths(self) -> list[int]:
        """The depths at which the logits should be the dense model's, and are not."""
        distances = self.comparison.distances if self.comparison else ()
        exact = [d for d in distances if self.plan.is_exact(self.dense, d.loops)]
        return [distance.loops for distance in exact if not distance.max_abs <= TOLERANCE]

    def as_text(self) -> str:
        written = self.result.written
        lines = [
            f"{self.result.source.path} -> {self.out} ({self.result.family.name})",
            *self._layer_lines(),
            *(f"copied: {', '.join(names)}" for names in [written.copied] if names),
            *(f"made: {', '.join(names)}" for names in [written.made] if names),
            *(f"left in the source: {', '.join(names)}" for names in [written.left] if names),
            *written.notes,
            *self._distance_lines(),
            *(
                f"at {n} loops they should be the source's, within {TOLERANCE}, AND ARE NOT"
                for n in self.wrong_depths()
            ),
            *self._cost_lines(),
            f"to train it: mythos train {self.result.training_file} --data.sources FILE_OR_FOLDER",
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for `json.dumps`."""
        cut, layers = self.plan.cut, len(dense_layers(self.dense))
        return {
            "source": str(self.result.source.path),
            "target": str(self.out),
            "format": self.result.family.name,
            **{part: list(getattr(cut, part)) for part in PARTS},
            "dropped": list(cut.dropped(layers)),
            "adapter": self.plan.adapter,
            "initial_state": self.result.source.config.initial_state,
            "comparison": dataclasses.asdict(self.comparison) if self.comparison else None,
            "cost": dataclasses.asdict(self.cost),
            "training_file": str(self.result.training_file),
        }

    def _layer_lines(self) -> list[str]:
        cut, layers, config = self.plan.cut, len(dense_layers(self.dense)), self.result.source.config
        lines = []
        for part in PARTS:
            taken = getattr(cut, part)
            often = ", run once" if part != "loop" else f", run {config.loops} times unless a call says otherwise"
            lines.append(f"{part}: {_layers(taken)}{often if taken else ''}")
        dropped = cut.dropped(layers)
        lines.append(f"dropped: {_layers(dropped)}" if dropped else f"dropped: none, all {layers} layers are kept")
        lines.append(ENTERS[self.plan.adapter])
        if self.plan.adapter != "none":
            lines.append(f"before the first loop, the state is {STARTS[config.initial_state]}")
        if self.dense.tied_embedding and not config.tied_embedding:
            lines.append("the head was the embedding; it is a matrix of its own now, with the same numbers")
        return lines

    def _distance_lines(self) -> list[str]:
        if self.comparison is None:
            return []
        lines = [
            f"on {self.comparison.tokens} {'random ' * self.comparison.are_random}tokens, before training; "
            f"the source's loss is {self.comparison.dense_loss:.4f} nats per token:",
            "  loops   max |Δlogits|   KL, nats/token   loss",
        ]
        for d in self.comparison.distances:
            lines.append(f"  {d.loops:5}   {d.max_abs:13.1e}   {d.kl:14.2e}   {d.loss:.4f}")
        return lines

    def _cost_lines(self) -> list[str]:
        c = self.cost
        forward = ", ".join(f"{flops / 1e9:.3g} at {loops}" for loops, flops in c.forward.items())
        hours = ", ".join(f"{_hours(hours)} on one {chip}" for chip, hours in c.hours.items())
        return [
            f"parameters: {c.parameters:,} (the source has {c.dense_parameters:,})",
            f"GFLOPs per token, forward: {forward} loops (the source: {c.dense_forward / 1e9:.3g})",
            f"GFLOPs per token, training: {c.training / 1e9:.3g} at a mean of {c.mean_loops} loops, gradients through "
            f"the last {c.backprop_loops} (the source: {c.dense_training / 1e9:.3g})",
            f"{self.result.training_file}: {c.tokens / 1e6:,.0f} million tokens, "
            f"{c.training * c.tokens / 1e15:,.3g} PFLOPs: {hours}, at {UTILISATION:.0%} of the peak",
        ]


def _layers(layers: tuple[int, ...]) -> str:
    if not layers:
        return "none"
    return f"{'layer' if len(layers) == 1 else 'layers'} {describe(layers)} of the source"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} minutes" if hours * 60 >= 1 else "less than a minute"
    return f"{hours:,.1f} hours"

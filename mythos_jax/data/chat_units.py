"""Units of conversations: as `units.py` has them of text, but with a weight for each token."""

import json
import threading
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass

import numpy as np

from mythos_jax.data.chat_encoder import ChatEncoder, Encoded, Sample
from mythos_jax.data.chat_record import RecordError, from_canonical
from mythos_jax.data.manifest import CONVERSATION_COUNTS, COUNTS
from mythos_jax.data.readers import SKIP_HINT, LeftOut, Piece
from mythos_jax.data.split import draw
from mythos_jax.data.text_parts import TextUnit, add_left_out
from mythos_jax.errors import ConfigError


@dataclass(frozen=True)
class ChatUnitEncoder:
    """Encodes conversations into tokens of `dtype`. skip_errors: leave out those that the template refuses."""

    encoder: ChatEncoder
    dtype: str
    skip_errors: bool

    def __call__(self, unit: TextUnit, stopped: threading.Event) -> dict[str, np.ndarray]:
        """Raises ConfigError, naming the record."""
        found: list[tuple[Piece, Encoded]] = []
        left_out = list(unit.left_out)
        for piece in unit.pieces:
            if stopped.is_set():
                raise CancelledError
            try:
                found.append((piece, self.encoder.encode(from_canonical(piece.text), stopped)))
            except RecordError as error:
                item = LeftOut(f"{piece.location}: {error}")
                if not self.skip_errors:
                    raise ConfigError(f"{item.text}; {SKIP_HINT}") from None
                add_left_out(left_out, item)
        samples = [
            (piece, encoded, i == 0, sample) for piece, encoded in found for i, sample in enumerate(encoded.samples)
        ]
        counts = [_counts(sample, encoded if first else None) for _, encoded, first, sample in samples]
        return {
            "tokens": np.concatenate([np.array([], self.dtype), *(s.tokens.astype(self.dtype) for *_, s in samples)]),
            "weights": np.concatenate([np.array([], np.float32), *(s.weights for *_, s in samples)]),
            "lengths": np.array([len(sample.tokens) for *_, sample in samples], np.int64),
            "text_bytes": np.array([sample.text_bytes for *_, sample in samples], np.int64),
            "begins": np.array([first for _, _, first, _ in samples], bool),
            "draws": np.array([draw(piece) for piece, *_ in samples], np.uint64),
            "counts": np.array([[count[name] for name in COUNTS] for count in counts], np.int64).reshape(
                -1, len(COUNTS)
            ),
            "left_out": np.array(json.dumps([asdict(item) for item in left_out])),
        }


def _counts(sample: Sample, conversation: Encoded | None) -> Counter[str]:
    """What is counted of a sample, and, if it is its first one, of a conversation."""
    counts = Counter(
        answers=sample.answers,
        unended=sample.unended,
        truncated=int(sample.dropped > 0),
        dropped=sample.dropped,
    )
    if conversation is not None:
        counts += Counter(name for name in CONVERSATION_COUNTS if getattr(conversation, name))
    return counts

"""What became of conversations, in words."""

from collections.abc import Mapping

from mythos_jax.data.manifest import ChatSplit, Manifest
from mythos_jax.streams import log


def say_chats(splits: Mapping[str, ChatSplit], request: Manifest) -> None:
    """Says what was done with conversations besides writing them as they are."""

    def total(name: str) -> int:
        return sum(getattr(split, name) for split in splits.values())

    if cut := total("cut"):
        log(f"{cut:,} conversations are longer than a row of {request.seq_len:,} targets, and are cut at turns")
    if truncated := total("truncated"):
        log(f"{truncated:,} turns are longer than a row; their ends, {total('dropped'):,} tokens, are cut off")
    if without := total("without_answer"):
        log(f"{without:,} parts of conversations are left out, because no answer that is trained on has room in them")
    if by_answer := total("by_answer"):
        log(
            f"{by_answer:,} conversations: the chat template writes earlier messages otherwise than the last one, so "
            "each answer is trained on in a text of its own"
        )
    if unended := total("unended"):
        log(f"{unended:,} answers have no token that ends them, so the model does not learn there to stop")


def describe(split: ChatSplit) -> str:
    """The counts of a split, for one line."""
    tokens = f"{split.trained:,} tokens trained on, {split.masked:,} masked, {split.padding:,} padding"
    return f"{split.answers:,} answers; {tokens}"

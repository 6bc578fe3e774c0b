"""What became of conversations, in words."""

from collections.abc import Callable, Iterator, Mapping

from mythos_jax.data.manifest import ChatSplit, Manifest
from mythos_jax.streams import counted, log


def say_chats(splits: Mapping[str, ChatSplit], request: Manifest) -> None:
    """Says what was done with conversations besides writing them as they are."""

    def total(name: str) -> int:
        return sum(getattr(split, name) for split in splits.values())

    for text in _lines(total, request.seq_len):
        log(text)


def _lines(total: Callable[[str], int], seq_len: int) -> Iterator[str]:
    if cut := total("cut"):
        be = _be(cut)
        row = f"a row of {counted(seq_len, 'target')}"
        yield f"{_conversations(cut)} {be} longer than {row}, and {be} cut at turns"
    if truncated := total("truncated"):
        lost = counted(total("dropped"), "token")
        yield f"{counted(truncated, 'turn')} {_be(truncated)} longer than a row; what is too much, {lost}, is cut off"
    if without := total("without_answer"):
        reason = "no token of an answer that is trained on has room in a row, with one before it"
        yield f"{counted(without, 'sample')} {_be(without)} left out, because {reason}"
    if by_answer := total("by_answer"):
        reason = "the chat template writes earlier messages otherwise than the last one"
        yield f"{_conversations(by_answer)}: {reason}, so each answer is trained on in a text of its own"
    if unended := total("unended"):
        yield f"{counted(unended, 'answer')} without the token that ends one: the model does not learn there to stop"
    if joined := total("joined"):
        yield (
            f"{counted(joined, 'completion')} of a text: the first token begins in the prompt, which has other tokens "
            "when it is given alone; a completion that begins with a space does not have this"
        )
    if unwritten := total("unwritten_tools"):
        yield f"{_conversations(unwritten)} with tools, which the chat template does not write"


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


def _conversations(number: int) -> str:
    return counted(number, "conversation")


def describe(split: ChatSplit) -> str:
    """The counts of a split, for one line."""
    tokens = f"{counted(split.trained, 'token')} trained on, {split.masked:,} masked, {split.padding:,} padding"
    return f"{counted(split.answers, 'answer')}; {tokens}"

"""Text to token ids and back: raw bytes, or any Hugging Face `tokenizer.json`.

Text is only ever text: a document that happens to contain the words `<|endoftext|>` is not cut in two by them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mythos_jax.errors import ConfigError
from mythos_jax.paths import to_path

TOKENIZER_FILE = "tokenizer.json"

# What published tokenizers call the token between two documents, the plainest names first: some of them have
# several (`<|endoftext|>` beside a chat turn's `<|im_end|>`), and the document's end is the one wanted here.
END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_text|>",
    "<|end_of_document|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|eot_id|>",
    "[SEP]",
)


class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    name: str
    vocab_size: int  # every id is below it, added tokens included
    end_of_document: int
    fingerprint: str  # equal exactly where the same text gives the same ids; the same on every machine

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [n], no special tokens added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, faster where the tokenizer has threads."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens, and ids that the tokenizer does not know, are left out."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` into a directory; writes nothing where there is no such file (bytes)."""
        ...


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer called `spec`: "bytes", or the path of a Hugging Face tokenizer.json.

    Raises ConfigError: no such file, not a tokenizer, or one that has no end-of-document token.
    """
    return ByteTokenizer() if spec == ByteTokenizer.name else HuggingFaceTokenizer(spec)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then end of document (256) and padding (257)."""

    name = "bytes"
    vocab_size = 258
    end_of_document = 256
    padding = 257
    fingerprint = hashlib.sha256(b"mythos_jax: utf-8 bytes, 256 end of document, 257 padding").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        # "surrogateescape": a prompt from the command line may hold bytes that are not UTF-8; they come back as bytes.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 (a generated text may end inside a character) become U+FFFD."""
        return bytes(int(i) for i in ids if 0 <= int(i) < 256).decode("utf-8", "replace")

    def save(self, directory: str | Path) -> None:
        pass


class HuggingFaceTokenizer:
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, path: str | Path):
        from tokenizers import Tokenizer as Backend

        path = to_path(path)
        try:
            self._json = path.read_bytes()
            # Of the content, not the bytes: the same tokenizer written by another program is the same tokenizer.
            canonical = json.dumps(json.loads(self._json), sort_keys=True)
        except OSError as error:
            raise ConfigError(
                f"tokenizer {path}: cannot be read ({error.strerror}); allowed: bytes, or a tokenizer.json"
            ) from None
        except ValueError:  # also UnicodeDecodeError
            raise ConfigError(f"tokenizer {path}: not JSON; allowed: bytes, or a Hugging Face tokenizer.json") from None
        try:
            self._backend = Backend.from_str(self._json.decode())
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"tokenizer {path}: not a tokenizer.json ({' '.join(str(error).split())})") from None
        # The file may carry its last user's settings; they would silently drop or add tokens.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        known = [name for name in END_OF_DOCUMENT_NAMES if name in vocabulary]
        if not known:
            raise ConfigError(
                f"tokenizer {path}: has no end-of-document token; allowed: one of {', '.join(END_OF_DOCUMENT_NAMES)}"
            )
        self.name = path.name
        self.end_of_document = vocabulary[known[0]]
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps, so counting them is not enough
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # a word it has no token for, not even an unknown one; half a surrogate pair
            raise ConfigError(
                f"tokenizer {self.name}: cannot encode the text ({' '.join(str(error).split())})"
            ) from None
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids if 0 <= int(i) < self.vocab_size], skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        (Path(directory) / TOKENIZER_FILE).write_bytes(self._json)

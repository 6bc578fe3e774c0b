"""Text to token ids and back: raw bytes, or any Hugging Face `tokenizer.json`.

Special tokens are recognised in text only on request: a document that contains the characters `<|endoftext|>` is not
split there.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mythos_jax.data.gguf import tokenizer_json
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.json_text import parse_json
from mythos_jax.paths import is_lfs_pointer, to_path, write_whole
from mythos_jax.typed import check_field

TOKENIZER_FILE = "tokenizer.json"

# What published tokenizers call their end-of-document token, in order of preference. A tokenizer may have several of
# these: `<|endoftext|>` between documents is preferred to `<|im_end|>` after a chat turn.
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


FALLBACK_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # how byte fallback spells a byte


class Tokenizer(Protocol):
    """What the rest of the package needs from a tokenizer."""

    name: str
    vocab_size: int  # greater than every id, including those of added tokens
    end_of_document: int
    fingerprint: str  # identifies the mapping from text to ids; the same on every machine

    @property
    def fallback_bytes(self) -> frozenset[int]:
        """Ids that stand for single bytes, of which only a complete run is text (byte fallback); mostly none."""
        ...

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """Ids that its file says to put before a text, such as a beginning of text; `encode` does not."""
        ...

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        """The ids of a text, int32 [n]. special_tokens: whether the spelling of a special token stands for it.

        Raises ConfigError if the tokenizer cannot represent the text.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for each text; faster if the tokenizer is multithreaded."""
        ...

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of a text in which the spellings of special tokens stand for them, and the characters of the text,
        from the first up to one past the last, that each of them stands for: int32 [n] each. Threads may call it."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens and unknown ids are skipped."""
        ...

    def spell(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens as they are written."""
        ...

    def visible(self, ids: Iterable[int]) -> list[int]:
        """The ids that `decode` does not skip."""
        ...

    def text_bytes(self, ids: Iterable[int], begins: bool = True) -> int:
        """UTF-8 bytes that ids add to a text, which they begin or continue; a part of a character counts too."""
        ...

    def token_bytes(self, number: int) -> bytes:
        """The bytes that a token adds to a text that it continues; of a special token those of its spelling."""
        ...

    def special_token(self, text: str) -> int | None:
        """The id of the special token that is written as `text`; None if there is none."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id of the token, special or not, that the vocabulary spells `text`; None if there is none."""
        ...

    def token_text(self, number: int) -> str | None:
        """How the vocabulary spells a token; None if there is no such id."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` into a directory. The byte tokenizer has no such file and writes nothing."""
        ...


def load_tokenizer(spec: str | Path, end_of_document: str | None = None) -> Tokenizer:
    """The byte tokenizer if `spec` is "bytes"; otherwise the Hugging Face tokenizer.json at that path or in that
    folder, or the tokenizer of that GGUF file.

    end_of_document: the name of that token; by default the first of `END_OF_DOCUMENT_NAMES` that it has.
    Raises ConfigError: no such file, not a tokenizer, or a tokenizer without an end-of-document token.
    """
    if spec != ByteTokenizer.name:
        return HuggingFaceTokenizer(spec, end_of_document)
    check_field(
        end_of_document is None, "end_of_document", end_of_document, "none with tokenizer bytes, which has its own"
    )
    return ByteTokenizer()


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, end of document as 256, padding as 257."""

    name = "bytes"
    vocab_size = 258
    end_of_document = 256
    padding = 257
    fingerprint = hashlib.sha256(b"mythos_jax: utf-8 bytes, 256 end of document, 257 padding").hexdigest()
    fallback_bytes: frozenset[int] = frozenset()
    first_tokens: tuple[int, ...] = ()

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        # Command-line arguments are decoded with "surrogateescape"; encoding with it restores bytes that are not UTF-8.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = [len(character.encode("utf-8", "surrogateescape")) for character in text]
        starts = np.repeat(np.arange(len(text), dtype=np.int32), lengths)
        return self.encode(text), starts, starts + 1

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Invalid UTF-8, such as a generated text that ends inside a character, becomes U+FFFD."""
        return bytes(self.visible(ids)).decode("utf-8", "replace")

    def spell(self, ids: Iterable[int]) -> str:
        special = {self.end_of_document: b"<end of document>", self.padding: b"<padding>"}
        return b"".join(special.get(int(i)) or bytes(self.visible([i])) for i in ids).decode("utf-8", "replace")

    def visible(self, ids: Iterable[int]) -> list[int]:
        return [int(i) for i in ids if 0 <= int(i) < 256]

    def text_bytes(self, ids: Iterable[int], begins: bool = True) -> int:
        return len(self.visible(ids))

    def token_bytes(self, number: int) -> bytes:
        return bytes([number]) if 0 <= number < 256 else self.spell([number]).encode()

    def special_token(self, text: str) -> int | None:
        return None  # these have no spelling

    def token_id(self, text: str) -> int | None:
        return None

    def token_text(self, number: int) -> str | None:
        return None

    def save(self, directory: str | Path) -> None:
        pass


class HuggingFaceTokenizer:
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, path: str | Path, end_of_document: str | None = None):
        from tokenizers import Tokenizer as Backend

        file = to_path(path)
        if file.is_dir():
            file /= TOKENIZER_FILE
        if is_lfs_pointer(file):
            raise ConfigError(f"tokenizer {path}: is a Git LFS pointer; run `git lfs pull` in its repository")
        try:
            self._json: bytes = tokenizer_json(Path(path)) if file.suffix == ".gguf" else file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"tokenizer {path}: cannot be read ({error.strerror}); allowed: bytes, or a tokenizer.json"
            ) from None
        try:
            # Hash the parsed content, not the bytes: formatting does not make a different tokenizer.
            canonical = json.dumps(parse_json(self._json), sort_keys=True)
        except (ValueError, RecursionError):  # also UnicodeDecodeError
            raise ConfigError(f"tokenizer {path}: not JSON; allowed: bytes, or a Hugging Face tokenizer.json") from None
        try:
            self._backend = Backend.from_str(self._json.decode())
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"tokenizer {path}: not a tokenizer.json ({one_line(error)})") from None
        # The file may contain its last user's truncation and padding settings, which would drop or add tokens.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        end_of_document = self._find_end(path, vocabulary, end_of_document)
        self.name: str = file.name
        self.end_of_document = vocabulary[end_of_document]
        self._end_name = end_of_document
        self.vocab_size = max(vocabulary.values()) + 1  # not len(vocabulary): ids may have gaps
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def _find_end(self, path: str | Path, vocabulary: dict[str, int], name: str | None) -> str:
        """The end-of-document token: the one of this name, else the first that has a usual name."""
        found = name or next((usual for usual in END_OF_DOCUMENT_NAMES if usual in vocabulary), None)
        if found is None:
            raise ConfigError(
                f"tokenizer {path}: has no end-of-document token; allowed: one of {', '.join(END_OF_DOCUMENT_NAMES)}, "
                "or the name of another of its tokens (--end-of-document, or data.end_of_document)"
            )
        if found in vocabulary and not (name and self._is_in_text(name, vocabulary[name])):
            return found
        special = [token.content for token in self._backend.get_added_tokens_decoder().values()]
        raise ConfigError(
            f"end_of_document: got {found!r}, allowed: a token of {path} that no text contains, such as "
            f"{', '.join(special[:20]) or 'one that you add to it'}"
        )

    def _is_in_text(self, name: str, number: int) -> bool:
        """Whether the text that a token stands for is read as this token; that of a special token is not."""
        for text in [name, self._backend.decode([number], skip_special_tokens=False)]:
            try:
                if number in self._backend.encode(text, add_special_tokens=False).ids:
                    return True
            except Exception:
                continue
        return False

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        self._backend.encode_special_tokens = not special_tokens
        try:
            return self.encode_batch([text])[0]
        finally:
            self._backend.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # for example, an unknown word without an unknown-word token; a lone surrogate
            raise ConfigError(f"tokenizer {self.name}: cannot encode the text ({one_line(error)})") from None
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        try:
            encoding = self._spans.encode(text, add_special_tokens=False)
        except Exception as error:
            raise ConfigError(f"tokenizer {self.name}: cannot encode the text ({one_line(error)})") from None
        spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), spans[:, 0], spans[:, 1]

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode(ids, skip_special_tokens=True)

    def spell(self, ids: Iterable[int]) -> str:
        return self._decode(ids, skip_special_tokens=False)

    def _decode(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def visible(self, ids: Iterable[int]) -> list[int]:
        return [int(i) for i in ids if int(i) in self._spelling]

    def text_bytes(self, ids: Iterable[int], begins: bool = True) -> int:
        shown = self.visible(ids)
        if "ByteLevel" in self._decoders:
            return sum(_level_bytes(self._spelling[i]) for i in shown)
        # Every byte of a fallback counts as one, also where the run is cut off in a character.
        shown = [self._one_byte if i in self.fallback_bytes else i for i in shown]
        # Decoders treat the first token of a text differently: its space is dropped.
        before = [] if begins else [self._ordinary]
        return len(self.decode([*before, *shown]).encode()) - len(self.decode(before).encode())

    def token_bytes(self, number: int) -> bytes:
        spelling = self._spelling.get(number)
        if spelling is None:
            return (self.token_text(number) or "").encode()
        if number in self.fallback_bytes:
            return bytes([int(spelling[3:5], 16)])
        if "ByteLevel" in self._decoders and LEVEL_ALPHABET.issuperset(spelling):
            return bytes(_LEVEL_BYTES[character] for character in spelling)
        before = [self._ordinary]  # decoders treat the first token of a text differently
        return self.decode([*before, number]).removeprefix(self.decode(before)).encode()

    def special_token(self, text: str) -> int | None:
        if text == self._end_name:
            return self.end_of_document
        return next((i for i, token in self._added.items() if token.special and token.content == text), None)

    def token_id(self, text: str) -> int | None:
        return self._backend.token_to_id(text)

    def token_text(self, number: int) -> str | None:
        return self._backend.id_to_token(number) if 0 <= number < self.vocab_size else None

    @cached_property
    def first_tokens(self) -> tuple[int, ...]:
        try:
            # Its post-processor knows no other way to be asked. The mask marks what it adds.
            encoding = self._backend.encode("a")
        except Exception:  # a tokenizer that has neither this word nor one for unknown words
            return ()
        added = takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        return tuple(number for number, _ in added)

    @cached_property
    def fallback_bytes(self) -> frozenset[int]:
        if "ByteFallback" not in self._decoders:
            return frozenset()
        return frozenset(i for i, token in self._spelling.items() if FALLBACK_BYTE.fullmatch(token))

    @cached_property
    def _spans(self) -> Any:
        """One that recognises special tokens, and has no post-processor, which could take white space off the spans."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(json.dumps({**json.loads(self._json), "post_processor": None}))
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def _added(self) -> dict[int, Any]:
        return self._backend.get_added_tokens_decoder()

    @cached_property
    def _decoders(self) -> set[str]:
        """The types of decoders, of which a tokenizer may have several in turn."""
        decoder = json.loads(self._json).get("decoder") or {}
        return {part["type"] for part in [decoder, *decoder.get("decoders", [])] if "type" in part}

    @cached_property
    def _spelling(self) -> dict[int, str]:
        """Every token that `decode` does not skip."""
        special = {token.content for token in self._added.values() if token.special}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return {i: token for token, i in vocabulary.items() if token not in special}

    @cached_property
    def _one_byte(self) -> int:
        """A fallback byte that is a letter, or the first of them."""
        letters = (i for i in self.fallback_bytes if self._spelling[i] == "<0x41>")
        return next(letters, min(self.fallback_bytes, default=0))

    @cached_property
    def _ordinary(self) -> int:
        """A token that is a word or a part of one."""
        return next((i for i in sorted(self._spelling) if self.decode([i]).isalnum()), 0)

    def save(self, directory: str | Path) -> None:
        write_whole(to_path(directory) / TOKENIZER_FILE, self._json)


# GPT-2's spelling of bytes: printable Latin-1 characters as they are, each other byte as a character from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_LEVEL_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
LEVEL_ALPHABET = frozenset(_LEVEL_BYTES)


def _level_bytes(token: str) -> int:
    """Bytes of a token of byte-level BPE. An added token may be spelled in plain text."""
    return len(token) if LEVEL_ALPHABET.issuperset(token) else len(token.encode())

"""One tokenizer of every kind that models use, trained on a little text of many scripts."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Don't stop; she's there, isn't she? 1, 2, 3, 4567890!",
    "    def main(argument):\n        return 'text'  # a comment\n\n\tdone\n",
    "Zażółć gęślą jaźń — naïve café, Straße, ça va; ελληνικά; Съешь же ещё этих мягких булок.",
    "今日は天気が良いです。東京に行きます。漢字とかな混じり文。我们都是学生。",
    "مرحبا بالعالم، हिन्दी में कुछ लिखें, ภาษาไทย, 한국어 문장입니다.",
    "🙂 😀👍🏽 👩‍👩‍👧‍👦 ∑∫√ →←",
] * 4
END = "<|endoftext|>"
OTHER = "<|im_end|>"  # a special token that does not end a document
LOSSLESS = ("bytes", "byte_level", "llama", "gemma", "metaspace", "unigram_bytes")  # of these, text survives


def _bpe(**trainer) -> tuple[dict[str, int], list]:
    """Vocabulary and merges of BPE on characters, with spaces as ▁."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False, **trainer))
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _with_fallback(normalizer, decoder) -> Tokenizer:
    """Only the commonest characters are in the vocabulary; others are bytes."""
    vocabulary, merges = _bpe(limit_alphabet=60)
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *vocabulary]
    ids = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoder
    return tokenizer


def _llama() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _with_fallback(normalizer, decoders.Sequence(parts))


def _gemma() -> Tokenizer:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _with_fallback(normalizers.Replace(" ", "▁"), decoders.Sequence(parts))


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(*_bpe()))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _unigram_bytes() -> Tokenizer:
    """As SentencePiece with byte fallback: T5's successors, mT5 and others."""
    vocabulary = [tuple(entry) for entry in json.loads(_unigram().to_str())["model"]["vocab"]]
    known = [entry for entry in vocabulary if entry[0].isascii() or "▁" in entry[0]]
    known += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(known, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _end_of_word() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _words() -> Tokenizer:
    """Without a decoder: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


BUILDERS = {
    "byte_level": _byte_level,
    "llama": _llama,
    "gemma": _gemma,
    "metaspace": _metaspace,
    "unigram": _unigram,
    "unigram_bytes": _unigram_bytes,
    "word_piece": _word_piece,
    "end_of_word": _end_of_word,
    "words": _words,
}
KINDS = ("bytes", *BUILDERS)


@cache
def backend(kind: str) -> Tokenizer:
    """The tokenizer of the `tokenizers` library, with two special tokens."""
    tokenizer = BUILDERS[kind]()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(OTHER, special=True)])
    return tokenizer


def save(kind: str, folder: Path) -> str:
    """Writes its tokenizer.json and returns the path; "bytes" is a tokenizer of ours and has no file."""
    if kind == "bytes":
        return kind
    backend(kind).save(str(folder / f"{kind}.json"))
    return str(folder / f"{kind}.json")


WORDS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b")
SPECIAL_WORDS = WORDS[:6]


def write_words(folder: Path, words=WORDS, special=SPECIAL_WORDS, first=None, last=None, **files) -> Path:
    """A directory with a tokenizer of whole words, which puts `first` and `last` around a text, and JSON files."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    if first or last:
        pairs = [(name, words.index(name)) for name in (first, last) if name]
        template = f"{first or ''} $A {last or ''}".strip()
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder

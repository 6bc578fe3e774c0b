"""What a model's files say about its text: each of them, which beats which, and what is wrong with one.

`tests_torch/test_conventions.py` compares the first tokens with those of transformers.
"""

import json
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType

from mythos_jax.data.conventions import TextConventions, documents, read_conventions
from mythos_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from mythos_jax.errors import ConfigError
from tests.tokenizer_kinds import SPECIAL_WORDS, WORDS, write_words


def read(folder: Path, family: str | None = "llama", vocab_size: int = 100) -> TextConventions:
    return read_conventions(folder / "tokenizer.json", load_tokenizer(folder), folder, vocab_size, family)


def test_our_own_data():
    tokenizer = ByteTokenizer()
    expected = TextConventions((256,), 256, (256,))
    assert documents(tokenizer) == read_conventions("bytes", tokenizer, None, 258) == expected


def test_begin():
    bos, none = TextConventions((1,), 1, (2,)), TextConventions((), 1, (2,))
    assert bos.begin([7, 8]) == bos.begin([1, 7, 8]) == [1, 7, 8]
    assert bos.begin([]) == [1]
    assert none.begin([7]) == [7]
    assert none.begin([]) == [1]
    assert TextConventions((1, 3), 1, ()).begin([1, 7]) == [1, 3, 1, 7]


@pytest.mark.parametrize(
    ("made", "files", "expected"),
    [
        # The template of tokenizer.json decides; a token after the text is not ours to put.
        ({"first": "<s>", "last": "</s>"}, {"tokenizer_config": {"bos_token": "<s>"}}, (1,)),
        ({"first": "<s>"}, {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": False}}, (1,)),
        ({"first": "<s>"}, {}, (1,)),
        # Without one, add_bos_token; a token that is named only is not put.
        ({}, {"tokenizer_config": {"bos_token": "<s>"}}, ()),
        ({"last": "</s>"}, {"tokenizer_config": {"bos_token": {"content": "<s>", "lstrip": False}}}, ()),
        ({}, {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": True}}, (1,)),
        ({}, {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": False}}, ()),
        ({}, {"tokenizer_config": {"bos_token": None, "add_bos_token": False}, "config": {"bos_token_id": 3}}, ()),
        # No tokenizer_config.json: what any file names, else the end of a document.
        ({}, {"special_tokens_map": {"bos_token": {"content": "<s>"}}, "config": {"bos_token_id": 4}}, (1,)),
        ({}, {"config": {"bos_token_id": 1}}, (1,)),
        ({}, {"generation_config": {"bos_token_id": 1}}, (1,)),
        ({}, {"config": {"bos_token_id": 65504}}, (3,)),  # no such token
        ({}, {"config": {"bos_token_id": None}}, (3,)),
        ({}, {}, (3,)),
    ],
)
def test_the_first_token(tmp_path, made, files, expected):
    assert read(write_words(tmp_path, **made, **files)).first_tokens == expected


def test_families(tmp_path):
    """Converted Huginn and Parcae have no other files; Raven's config.json has Huginn's ids; see faults of peers.md."""
    huginn = write_words(tmp_path / "h", ["<|begin_text|>", "<|end_text|>", "a"], ["<|begin_text|>", "<|end_text|>"])
    assert read(huginn, "huginn").first_tokens == read(huginn, "mythos_jax").first_tokens == (0,)
    assert read(huginn, "huginn").stop_tokens == (1,)
    parcae = write_words(tmp_path / "p", ["a", "<|bos|>", "<|eos|>"], ["<|bos|>", "<|eos|>"])
    assert read(parcae, "parcae").first_tokens == (1,)
    # Their loaders put it themselves, so a tokenizer that does not is no statement, unless it says so.
    (parcae / "tokenizer_config.json").write_text('{"bos_token": "<|bos|>"}')
    assert read(parcae, "parcae").first_tokens == (1,)
    assert read(parcae, "llama").first_tokens == ()
    (parcae / "tokenizer_config.json").write_text('{"bos_token": "<|bos|>", "add_bos_token": false}')
    assert read(parcae, "parcae").first_tokens == ()
    # In this vocabulary Huginn's ids 4 and 5 would be words, "a" and "b".
    words = ["<unk>", "<s>", "</s>", "<pad>", "a", "b"]
    wrong = {"bos_token_id": 4, "eos_token_id": 5}
    raven = write_words(tmp_path / "r", words, words[:4], config=wrong, generation_config=wrong)
    assert read(raven, "raven").first_tokens == read(raven, "raven_olmo").first_tokens == (2,)
    assert read(raven, "raven").stop_tokens == (2,)
    assert read(raven, "huginn").stop_tokens == (2, 5)
    (raven / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    assert read(raven, "raven").first_tokens == (1,)


def test_what_ends_an_answer(tmp_path):
    """Every file adds to it; ids that the model cannot say do not count."""
    folder = write_words(tmp_path, config={"eos_token_id": 3}, generation_config={"eos_token_id": [2, 99, 500]})
    assert read(folder).stop_tokens == (2, 3, 99)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert read(folder).stop_tokens == (2, 3, 5, 99)
    assert read(folder).prefix_token == 5  # an empty text starts with the end of one if there is no beginning
    assert read(folder).special_tokens == {"eos_token": "<|im_end|>"}


def test_ouro_and_nanbeige(tmp_path):
    """Ouro's config.json has 0 for both, which in a chat is <|im_end|>; Nanbeige's base and instruct models differ."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a"]
    ouro = write_words(tmp_path / "o", words, words[:3], config={"bos_token_id": 0, "eos_token_id": 0})
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": "<|im_start|>x<|im_end|>"}
    (ouro / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read(ouro, "ouro").first_tokens == ()
    assert read(ouro, "ouro").stop_tokens == (0, 2)
    (ouro / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}')
    assert (read(ouro, "ouro").prefix_token, read(ouro, "ouro").stop_tokens) == (1, (0, 2))
    words = ["<unk>", "<s>", "</s>", "a", "<|im_start|>", "<|im_end|>"]
    for bos, eos, stops in [("<s>", "</s>", (2,)), ("<|im_start|>", "<|im_end|>", (2, 5))]:
        ids = {"bos_token_id": words.index(bos), "eos_token_id": words.index(eos)}
        settings = {"bos_token": {"content": bos}, "eos_token": {"content": eos}, "add_bos_token": True}
        model = write_words(
            tmp_path / bos.strip("<|>"), words, words[:3] + words[4:], config=ids, tokenizer_config=settings
        )
        assert read(model, "nanbeige").first_tokens == (words.index(bos),)
        assert read(model, "nanbeige").stop_tokens == stops


def test_special_tokens(tmp_path):
    """The older file counts only where the newer one does not list every token, as in transformers."""
    older = {"bos_token": "a", "pad_token": {"content": "</s>"}, "additional_special_tokens": ["b"]}
    newer = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "image_token": "b"}
    folder = write_words(tmp_path, tokenizer_config=newer | {"unk_token": None}, special_tokens_map=older)
    texts = {"bos_token": "a", "eos_token": "</s>", "image_token": "b", "pad_token": "</s>"}
    assert read(folder).special_tokens == texts
    (folder / "tokenizer_config.json").write_text(json.dumps(newer | {"added_tokens_decoder": {}}))
    assert read(folder).special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "image_token": "b"}


def test_the_chat_template(tmp_path):
    folder = write_words(tmp_path)
    assert read(folder).chat_template is None
    (folder / "chat_template.json").write_text('{"chat_template": "oldest"}')
    assert read(folder).chat_template == "oldest"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "talk"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read(folder).chat_template == "talk"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "text"}))
    assert read(folder).chat_template == "text"
    (folder / "chat_template.jinja").write_text("own file\n")
    assert read(folder).chat_template == "own file\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: got list, allowed: an object"),
        ("tokenizer_config.json", "[" * 100_000, r"tokenizer_config\.json: not JSON"),
        ("tokenizer_config.json", '{"bos_token": 3}', r"tokenizer_config\.json: bos_token: got 3"),
        ("special_tokens_map.json", '{"eos_token": {"lstrip": true}}', r"special_tokens_map\.json: eos_token: got"),
        ("tokenizer_config.json", '{"add_bos_token": true}', r"tokenizer_config\.json: bos_token: got None"),
        (
            "tokenizer_config.json",
            '{"add_bos_token": true, "bos_token": "zzz"}',
            r"tokenizer_config\.json: bos_token: got 'zzz', allowed: a token, because of add_bos_token",
        ),
        ("tokenizer_config.json", '{"chat_template": 3}', r"chat_template: got int, allowed: a text"),
        ("tokenizer_config.json", '{"chat_template": ["x"]}', r"chat_template: got list, allowed: a text"),
        ("chat_template.json", '{"chat_template": {}}', r"chat_template\.json: chat_template: got dict"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: not UTF-8"),
        ("config.json", '{"eos_token_id": "</s>"}', r"config\.json: eos_token_id: got '</s>', allowed: an integer"),
        ("generation_config.json", '{"eos_token_id": [1, true]}', r"eos_token_id: got \[1, True\]"),
        ("generation_config.json", '{"bos_token_id": -1}', r"generation_config\.json: bos_token_id: got -1"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, name, content, message):
    folder = write_words(tmp_path)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_a_beginning_that_the_model_does_not_know(tmp_path):
    folder = write_words(tmp_path, first="<|im_end|>")
    with pytest.raises(
        ConfigError, match=r"tokenizer\.json: the beginning of a text: got token 5, allowed: below .* 5"
    ):
        read(folder, vocab_size=5)


def write_gguf(path: Path, pre: str = "gpt-2", template: str | None = None, **settings) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*WORDS, "ab"])
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL_WORDS) + [TokenType.NORMAL] * 3)
    writer.add_token_merges(["a b"])
    for name, value in settings.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("settings", "first", "prefix", "stops"),
    [
        ({}, (), 3, (3,)),
        ({"bos_token_id": 1, "eos_token_id": 2}, (), 1, (2, 3)),
        ({"bos_token_id": 1, "add_bos_token": True}, (1,), 1, (3,)),
        ({"bos_token_id": 1, "pre": "llama-bpe"}, (1,), 1, (3,)),  # llama.cpp's default for Llama 3
        ({"bos_token_id": 1, "pre": "llama-bpe", "add_bos_token": False}, (), 1, (3,)),
        ({"eos_token_id": 2, "eot_token_id": 5, "eom_token_id": 4}, (), 2, (2, 3, 4, 5)),
        ({"eos_token_id": 2, "template": "<|im_end|>"}, (), 2, (2, 3, 5)),
    ],
)
def test_gguf(tmp_path, settings, first, prefix, stops):
    path = write_gguf(tmp_path / "model.gguf", **settings)
    got = read_conventions(path, load_tokenizer(path), None, 9)
    assert (got.first_tokens, got.prefix_token, got.stop_tokens) == (first, prefix, stops)
    assert got.chat_template == settings.get("template")
    ids = {"bos_token": settings.get("bos_token_id"), "eos_token": settings.get("eos_token_id")}
    assert got.special_tokens == {name: WORDS[number] for name, number in ids.items() if number}


def test_a_gguf_with_wrong_ids(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", bos_token_id=9)
    with pytest.raises(ConfigError, match=r"model\.gguf: tokenizer\.ggml\.bos_token_id: got 9, allowed: below 9"):
        read_conventions(path, load_tokenizer(path), None, 9)
    path = write_gguf(tmp_path / "other.gguf", add_bos_token=1)
    with pytest.raises(ConfigError, match=r"other\.gguf: tokenizer\.ggml\.add_bos_token: got 1"):
        read_conventions(path, load_tokenizer(path), None, 9)

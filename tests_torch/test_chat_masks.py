"""What fine-tuning trains on in a conversation, against transformers: its tokens, and its mask of assistant tokens."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mythos_jax.data.chat_encoder import ChatEncoder, make_chat_encoder
from mythos_jax.data.chat_record import parse_record
from mythos_jax.data.conventions import gguf_files
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.porting.hub import resolve
from tests.chats import MARKED, dialogue, golden_template, prepare, run

TEXTS = ["What is 2 + 2?", "4.", "  and é 漢字 🎉?\n", "<b>It's\n\nfine</b>", "naïve café", "\tx = 'y'\n", "ok", "…"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer and chat template, as files that transformers reads."""
    folder = tmp_path_factory.mktemp("smollm2")
    for name, content in gguf_files(resolve("smollm2")).items():
        (folder / name).write_bytes(content)
    return folder


def conversations(n: int) -> list[list[dict[str, Any]]]:
    rng = random.Random(0)
    found = []
    for _ in range(n):
        texts = [rng.choice(TEXTS) for _ in range(2 * rng.randint(1, 4))]
        found.append(dialogue(*texts, system=rng.choice([None, "Be brief."]))["messages"])
    return found


def theirs(folder: Path, template: str | None = None) -> Any:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def ours(folder: Path, template: Path | None = None) -> ChatEncoder:
    return make_chat_encoder(folder, load_tokenizer(folder), template or "", 10**6)


def ids(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool = False) -> list[int]:
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    assert isinstance(found, list)
    return found


def test_smollm2_by_its_beginnings(smollm2: Path) -> None:
    """An answer's tokens are those after the prompt that transformers makes of what is before it."""
    tokenizer, encoder = theirs(smollm2), ours(smollm2)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for messages in conversations(40):
        (sample,) = encoder.encode(parse_record({"messages": messages})).samples
        whole = ids(tokenizer, messages)
        expected = [0.0] * len(whole)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, upto = ids(tokenizer, messages[:i], prompt=True), ids(tokenizer, messages[: i + 1])
                assert whole[: len(upto)] == upto
                # White space at the start of an answer may be one token with that at the end of the prompt.
                start = next(i for i, pair in enumerate(zip([*prompt, None], upto, strict=False)) if pair[0] != pair[1])
                assert start >= len(prompt) - (message["content"][0].isspace())
                for j in range(start, upto.index(end, start) + 1):
                    expected[j] = 1.0
        assert sample.tokens.tolist() == whole
        assert sample.weights.tolist() == expected


@pytest.mark.parametrize("name", ["marked", "features"])
def test_the_mask_of_generation_blocks(name: str, smollm2: Path, tmp_path: Path) -> None:
    template = MARKED if name == "marked" else golden_template(name)
    (tmp_path / "template.jinja").write_text(template)
    tokenizer, encoder = theirs(smollm2, template), ours(smollm2, tmp_path / "template.jinja")
    for messages in conversations(40):
        found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        (sample,) = encoder.encode(parse_record({"messages": messages})).samples
        assert sample.tokens.tolist() == found["input_ids"]
        assert [int(weight > 0) for weight in sample.weights] == [0, *found["assistant_masks"][1:]]


@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "llama3_1", "zephyr", "olmo2", "mistral", "qwen3"])
def test_tokens_of_other_templates(name: str, smollm2: Path, tmp_path: Path) -> None:
    """Each sample is a whole conversation, or, where the template rewrites, one up to an answer."""
    (tmp_path / "template.jinja").write_text(golden_template(name))
    tokenizer = theirs(smollm2, golden_template(name))
    encoder = ours(smollm2, tmp_path / "template.jinja")
    for messages in conversations(20):
        messages = messages[messages[0]["role"] == "system" :]
        encoded = encoder.encode(parse_record({"messages": messages}))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        ends = [i + 1 for i in answers] if encoded.by_answer else [len(messages)]
        assert [sample.tokens.tolist() for sample in encoded.samples] == [
            ids(tokenizer, messages[:end]) for end in ends
        ]
        assert sum(sample.answers for sample in encoded.samples) == len(answers)


def test_the_word_smollm2_names_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: from records to a row that is shown."""
    folder = prepare(tmp_path, [dialogue("Is it so?", "It is.")], model="smollm2", seq_len=64)
    assert run("data", "show", folder) == 0
    assert "<|im_start|>assistant\n[[It is.<|im_end|>]]\n" in capsys.readouterr().out

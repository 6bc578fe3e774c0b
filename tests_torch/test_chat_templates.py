"""Chat templates as transformers renders them: the golden texts of the tests, and the template of a real model.

Run as a program, it writes the golden texts anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mythos_jax.data.chat_template import ChatTemplate
from mythos_jax.data.conventions import read_conventions
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.porting.hub import resolve

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "chat_templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATIONS = json.loads((FOLDER / "conversations.json").read_text(encoding="utf-8"))


def render(source: str, messages: list[dict[str, Any]], prompt: bool) -> str | None:
    """None if the template refuses the conversation."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:
        return None
    assert isinstance(text, str)
    return text


def golden(name: str) -> dict[str, str | None]:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return {
        f"{conversation}{'+prompt' * prompt}": render(source, messages, prompt)
        for conversation, messages in CONVERSATIONS.items()
        for prompt in (False, True)
    }


NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))


@pytest.mark.parametrize("name", NAMES)
def test_golden_texts(name):
    assert json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))[name] == golden(name)


def test_the_template_of_a_real_model():
    """SmolLM2's, which its GGUF file has in its metadata."""
    path = resolve("smollm2")
    conventions = read_conventions(path, load_tokenizer(path), path.parent, 49152, "llama")
    assert conventions.chat_template is not None
    made = ChatTemplate(conventions.chat_template, "of smollm2", conventions.special_tokens)
    for messages in CONVERSATIONS.values():
        for prompt in (False, True):
            expected = render(conventions.chat_template, messages, prompt)
            if expected is None:
                with pytest.raises(ConfigError, match="chat template of smollm2: "):
                    made.render(messages, prompt=prompt)
            else:
                assert made.render(messages, prompt=prompt) == expected
    assert made.answer_end == "<|im_end|>\n"
    assert "The capital" in render(conventions.chat_template, [{"role": "user", "content": "The capital"}], True)


if __name__ == "__main__":
    texts = json.dumps({name: golden(name) for name in NAMES}, indent=1, ensure_ascii=False)
    (FOLDER / "golden.json").write_text(texts + "\n", encoding="utf-8")

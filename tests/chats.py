"""A model's directory with a chat template, and conversations, for the tests of fine-tuning data."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mythos_jax.cli import main
from mythos_jax.data.rows import TokenRows
from tests.tokenizer_kinds import backend

TEMPLATES = Path(__file__).parent / "golden" / "chat_templates"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As CHATML, but it says itself what the model's words are: only their contents, without what ends them.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_model(folder, template=CHATML, kind="byte_level", **settings):
    """The path of a directory with a tokenizer and a chat template; None: without a template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(backend(kind).to_str())
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    tree = {"bos_token": "<s>", "eos_token": "<|im_end|>", **settings}
    if template is not None:
        tree["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(tree))
    return folder


def golden_template(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


def dialogue(*texts, system=None):
    """A record of questions and answers in turn."""
    messages = [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return {"messages": messages if system is None else [turn("system", system), *messages]}


def write_chats(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run(*words):
    """The exit code of a command."""
    return main([str(word) for word in words])


def prepare(tmp_path, records, *words, model=None, seq_len=64, out="out"):
    """Prepares conversations and returns the folder; nothing is held out unless `words` say so."""
    source = write_chats(tmp_path / "chats.jsonl", records)
    model = model or write_model(tmp_path / "model")
    flags = ["--held-out-fraction", "0"] if "--held-out-fraction" not in words else []
    code = run(
        *("data", "prepare", source, "--chat", "--out", tmp_path / out, "--tokenizer", model),
        *("--seq-len", seq_len, *flags, *words),
    )
    assert code == 0
    return tmp_path / out


def samples(folder, split="train"):
    """The ids and weights of every sample of a prepared folder, in the order of the rows."""
    rows = TokenRows(folder, split)
    found = []
    for number in range(len(rows)):
        ids, weights, numbers = rows.stream(number)
        assert numbers.tolist() == sorted(numbers.tolist())
        found += [(ids[numbers == n].tolist(), weights[numbers == n].tolist()) for n in np.unique(numbers)]
    return found

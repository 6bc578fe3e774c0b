"""Text in, text out."""

from typing import Any

import jax.numpy as jnp

from mythos_jax.config import ConfigError
from mythos_jax.inference.generate import GenerateResult, generate
from mythos_jax.inference.speculative import speculate
from mythos_jax.runs import Opened
from mythos_jax.sharding import use_mesh


def complete(opened: Opened, prompt: str, tokenizer: str | None = None, **keywords: Any) -> tuple[str, GenerateResult]:
    """What the model continues the prompt with, up to its end-of-document token; other keywords as in `generate`, or,
    with `draft_loops`, as in `speculate`.

    tokenizer: for a model that has none, as for `load_tokenizer`. The prompt follows an end-of-document token, as
    every document does in training. Raises ConfigError for a prompt or a number that the model cannot take.
    """
    if task := opened.config.data.task.name:
        raise ConfigError(f"{opened.directory}: was trained on task {task}, which is no text; allowed: `mythos eval`")
    reader = opened.tokenizer(tokenizer)
    end = reader.end_of_document
    tokens = jnp.asarray([[end, *reader.encode(prompt)]], jnp.int32)
    try:
        with use_mesh(opened.mesh):
            decode = speculate if "draft_loops" in keywords else generate
            result = decode(opened.model, opened.variables, tokens, stop_tokens=(end,), **keywords)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return reader.decode(result.tokens[0, : int(result.lengths[0])].tolist()), result

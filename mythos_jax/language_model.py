"""`mythos_jax.load`: a model with its weights, tokenizer, config and mesh in one object that one can talk to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import jax
import numpy as np
from jax.sharding import Mesh

from mythos_jax.config import Config, MeshConfig
from mythos_jax.data.chat_template import Message
from mythos_jax.data.tokenizer import Tokenizer
from mythos_jax.evaluation.evaluate import evaluate_model, evaluate_on_tasks
from mythos_jax.evaluation.results import Evaluation
from mythos_jax.inference.chat import Chat, as_messages
from mythos_jax.inference.text import RowOptions, Seed, TextOptions, TextStream, stream_texts, text_logits
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.storage import Dtype, Storage
from mythos_jax.runs.load import LoadedModel, load_model

Texts = list[str] | tuple[str, ...]  # not Sequence[str], which a str is, too
Policies = Halting | str | Sequence[Halting | str]


def load(
    path: str | Path,
    *,
    step: int | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    mesh: MeshConfig | None = None,
    dtype: Dtype = "float32",
    weights: Literal["int8"] | None = None,
    overrides: Sequence[str] = (),
    base: str | None = None,
    merge: bool = False,
) -> "LanguageModel":
    """A trained model, ready to use.

    path: the run directory of `mythos train`, a pretrained directory or file, a PEFT directory, or a Hugging Face id.
    step: the checkpoint of a run (default: the newest).
    config: for a pretrained file that holds only tensors: a `config.json`, or one of our YAML files.
    tokenizer: a `tokenizer.json` or "bytes", for a model that has none.
    mesh: how the weights are divided over the devices. Default: as in training if that fits the devices that are here,
      else the default mesh.
    dtype: of the stored weights; bfloat16 or float16 take half the memory. weights: "int8" stores the matrices as int8,
      with a scale per output channel: a quarter of the memory, and faster decoding (docs/speed.md).
    overrides: command-line words that set fields of the config, such as `["--evaluation.max_rows", "100"]`.
    base: of a PEFT directory or a LoRA run, where the model is that its low-rank weights belong to (default: where they
      say).
    merge: of a LoRA run: add the low-rank weights to the matrices that they are beside, which decodes faster; else they
      are a collection of their own.

    Raises ConfigError: neither a run nor a model, no such checkpoint, files that are damaged or do not fit.
    """
    storage = Storage.named(dtype, weights)
    loaded = load_model(
        path,
        step,
        config=config,
        tokenizer=tokenizer,
        mesh=mesh,
        storage=storage,
        merge=merge,
        overrides=overrides,
        base=base,
    )
    return LanguageModel(loaded)


def evaluate(model: "LanguageModel | str | Path", data: str | Path | None = None, **options: Any) -> Evaluation:
    """`LanguageModel.evaluate` of a model, or of the one that `load` finds at a path."""
    lm = model if isinstance(model, LanguageModel) else load(model)
    return lm.evaluate(data, **options)


@dataclass(frozen=True)
class LanguageModel:
    """A model with everything that belongs to it.

        lm = mythos_jax.load("runs/quickstart")
        lm.generate("def main", loops=16, halting="latent:0.03")
        lm.chat("What is the capital of France?")
        lm.model.apply(lm.variables, tokens_BT)

    loaded: the parts, and where they come from (`directory`, `step`).
    """

    loaded: LoadedModel

    @property
    def model(self) -> Mythos:
        return self.loaded.model

    @property
    def variables(self) -> dict[str, Any]:
        """Collections `params` and `balance`, `predictor` if one was trained, `low_rank` of a LoRA run; on the mesh."""
        return self.loaded.variables

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if the model has none: its tokens are not text, or no `tokenizer.json` came with it."""
        return self.loaded.tokenizer

    @property
    def config(self) -> Config:
        """The run's config; for a pretrained model only its `model` is meaningful."""
        return self.loaded.config

    @property
    def mesh(self) -> Mesh:
        return self.loaded.mesh

    @overload
    def generate(self, texts: str, *, stream: Literal[False] = False, **options: Unpack[TextOptions]) -> str: ...

    @overload
    def generate(
        self, texts: Texts, *, stream: Literal[False] = False, **options: Unpack[TextOptions]
    ) -> list[str]: ...

    @overload
    def generate(self, texts: str, *, stream: Literal[True], **options: Unpack[TextOptions]) -> TextStream[str]: ...

    @overload
    def generate(
        self, texts: Texts, *, stream: Literal[True], **options: Unpack[TextOptions]
    ) -> TextStream[list[str]]: ...

    def generate(
        self,
        texts: str | Texts,
        *,
        loops: int | None = None,
        halting: Halting | str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: Seed = 0,
        stream: bool = False,
        **options: Any,
    ) -> str | list[str] | TextStream[str] | TextStream[list[str]]:
        """What the model continues a text with, or each text of a list, up to a token that ends it.

        A list is one batch; each text gets the continuation that it gets alone. A text starts and ends as the model's
        own files say, with a beginning of text if there is one; in a run, an end-of-document token stands before and
        after it, as in training.

        loops: depth (default: the config's); with a policy, the maximum.
        max_new_tokens: default: as many as fit in the model's context, at most 128.
        halting: a policy that lets tokens stop early, such as "latent:0.03".
        temperature: 0 is greedy. top_k: sample from the k most likely tokens; 0: all. top_p: sample from the most
          likely tokens whose probabilities add up to this.
        seed: one for all texts, or one per text.
        stream: return an iterator over pieces of text as they are decoded (for a list of texts: lists of pieces), with
          `stats`.
        options: draft_loops, draft_tokens, initial_state, loop_cache, prefill_chunk and special_tokens, as in
          `inference.text.stream_texts`.

        Raises ConfigError for a text or a number that the model cannot take, or a model without a tokenizer.
        """
        pieces = stream_texts(
            self.loaded,
            [texts] if isinstance(texts, str) else texts,
            loops=loops,
            halting=halting,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            **options,
        )
        if isinstance(texts, str):
            single = TextStream((piece for (piece,) in pieces), pieces.stats)
            return single if stream else "".join(single)
        return pieces if stream else ["".join(parts) for parts in zip(*pieces, strict=True)]

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        system: str | None = None,
        chat_template: str | Path | None = None,
        stream: Literal[False] = False,
        **options: Unpack[RowOptions],
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        system: str | None = None,
        chat_template: str | Path | None = None,
        stream: Literal[True],
        **options: Unpack[RowOptions],
    ) -> TextStream[str]: ...

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        system: str | None = None,
        chat_template: str | Path | None = None,
        stream: bool = False,
        **options: Unpack[RowOptions],
    ) -> str | TextStream[str]:
        """The model's answer to a question, or to a conversation: messages such as {"role": "user", "content": "Hi"},
        of which the last is answered.

        system: a message before the first. chat_template: a Jinja file (default: the model's own template).
        stream, options: as in `generate`; max_new_tokens: default: as many as fit, at most 512.

        Raises ConfigError for a conversation or a number that the model cannot take, or a model without a template.
        """
        pieces = Chat(self.loaded, chat_template).stream(as_messages(messages, system), **options)
        return pieces if stream else "".join(pieces)

    def logits(
        self,
        text_or_tokens: str | Sequence[int] | np.ndarray | jax.Array,
        *,
        loops: int | None = None,
        halting: Halting | str | None = None,
        initial_state: str | None = None,
        seed: int = 0,
        special_tokens: bool = False,
    ) -> jax.Array:
        """Next-token logits, float32 [T, V], or [B, T, V] for tokens [B, T].

        A text starts as in `generate`: after one token, such as a beginning of text, row t predicts the text's token t.
        The last row predicts what comes after the text. Tokens are taken as they are.

        initial_state, seed: for models that start from noise. special_tokens: as in `generate`.

        Raises ConfigError for tokens that the model cannot take.
        """
        return text_logits(
            self.loaded,
            text_or_tokens,
            loops=loops,
            halting=halting,
            initial_state=initial_state,
            seed=seed,
            special_tokens=special_tokens,
        )

    def evaluate(
        self,
        data: str | Path | None = None,
        *,
        loops: int | Sequence[int] | None = None,
        halting: Policies = (),
        expected: bool = False,
        with_loop_trace: bool = False,
        progress: bool = False,
    ) -> Evaluation:
        """Quality at several depths and under halting policies, on the held-out rows of prepared data.

        data: a folder that `mythos data prepare` wrote (default: the run's own data, or the problems of its task).
        loops: depths (default: the config's, else powers of two up to twice the trained depth).
        halting: policies such as "latent:0.03", within the largest depth; "latent" alone is a sweep of thresholds.
        expected: for a model with an exit gate, also its expected logits at each depth.
        with_loop_trace: also how states change loop by loop. progress: show a progress bar.

        Raises ConfigError: no data, rows of another tokenizer, a policy that the model cannot follow, no exit gate.
        """
        return evaluate_model(
            self.loaded,
            data=None if data is None else str(data),
            loops=_depths(loops),
            halting=_policies(halting),
            expected=expected,
            with_loop_trace=with_loop_trace,
            progress=progress,
        )

    def evaluate_on_tasks(
        self,
        tasks: Sequence[str],
        *,
        loops: int | Sequence[int] | None = None,
        halting: Policies = (),
        include_path: str | Path | None = None,
        limit: int | None = None,
        seed: int | None = None,
        progress: bool = False,
    ) -> Evaluation:
        """Scores on tasks of lm-evaluation-harness (the extra `lm-eval`).

        tasks: names that the harness knows, or paths of task files. include_path: a folder with more task files.
        limit: documents per task (default: all). seed: few-shot examples and sampling (default: the harness's own).
        loops: depths (default: the config's). Other keywords as in `evaluate`.

        Raises ConfigError: the harness is not installed, an unknown task, a model without a tokenizer.
        """
        return evaluate_on_tasks(
            self.loaded,
            tasks,
            loops=_depths(loops),
            halting=_policies(halting),
            include_path=None if include_path is None else str(include_path),
            limit=limit,
            seed=seed,
            progress=progress,
        )

    def __repr__(self) -> str:
        where = "" if self.loaded.step is None else f", step {self.loaded.step}"
        return f"LanguageModel({str(self.loaded.directory)!r}{where})"


def _depths(loops: int | Sequence[int] | None) -> Sequence[int] | None:
    return [loops] if isinstance(loops, int) else loops


def _policies(halting: Policies) -> list[Halting]:
    policies = [halting] if isinstance(halting, Halting | str) else halting
    return [Halting.parse(policy) if isinstance(policy, str) else policy for policy in policies]

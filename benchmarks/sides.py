"""The two sides of compare_openmythos: the PyTorch original and ours, with the same weights and tokens.

Every call waits for its result, so that it can be timed.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from open_mythos.main import MythosConfig, OpenMythos

from benchmarks import own_loop
from benchmarks.steps import Shape, batch_of, config_of
from benchmarks.timing import Call, exit_with
from mythos_jax.config import Config, ModelConfig
from mythos_jax.inference.generate import GenerateResult, generate
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.pretrained import load_pretrained
from mythos_jax.runs.state import Constants, TrainState
from mythos_jax.sharding import make_mesh
from mythos_jax.training.step import init_state, make_train_step

NEVER_HALT = -20.0  # a bias of the halting logit that leaves no weight for halting


@dataclass(frozen=True)
class Workload:
    """What both sides compute. tokens: int32 [N, T + 1], N >= rows: a batch is its first rows."""

    config: Config  # batch size, sequence length, optimizer settings
    tokens: np.ndarray
    rows: int
    prompt: int  # tokens of each prompt in decoding


class Original:
    """open-mythos in PyTorch. On a GPU it runs under autocast to bfloat16."""

    def __init__(self, model: OpenMythos, workload: Workload, on_gpu: bool) -> None:
        self._device = "cuda" if on_gpu else "cpu"
        self._model, self._workload, self._on_gpu = model.to(self._device), workload, on_gpu
        self._tokens = torch.from_numpy(workload.tokens).long().to(self._device)
        self._loops = workload.config.model.loops
        # Made by the first train step: it is twice as large as the model, and decoding does not need it.
        self._optimizer: torch.optim.Optimizer | None = None

    def parameters(self) -> int:
        return sum(p.numel() for p in self._model.parameters())

    def logits(self) -> np.ndarray:
        return self.forward().float().cpu().numpy()

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        with self._autocast():
            logits = self._model(self._tokens[: self._workload.rows, :-1], n_loops=self._loops)
        self._wait()
        return logits

    @torch.no_grad()
    def decode(self, rows: int, new_tokens: int) -> None:
        prompts = self._tokens[:rows, : self._workload.prompt]
        with self._autocast():
            self._model.generate(prompts, max_new_tokens=new_tokens, n_loops=self._loops, top_k=1)
        self._wait()

    def train_step(self) -> None:
        training, rows = self._workload.config.training, self._workload.rows
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(
                self._model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
            )
        self._model.train()
        with self._autocast():
            logits = self._model(self._tokens[:rows, :-1], n_loops=self._loops)
            loss = F.cross_entropy(logits.flatten(0, 1), self._tokens[:rows, 1:].flatten())
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), training.gradient_clip)
        self._optimizer.step()
        self._model.eval()
        self._wait()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._on_gpu)

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


class Ours:
    """mythos_jax, with the converted weights."""

    def __init__(self, variables: Any, workload: Workload, halting: bool) -> None:
        self.config: ModelConfig = workload.config.model
        self.loops = self.config.loops
        self._workload = workload
        self._variables = jax.device_put(variables, jax.devices()[0])
        self._halting = Halting("act") if halting else None
        model = Mythos(self.config)
        # With a cache, a token can only stop looping if it is frozen when it halts.
        self._decoder = Mythos(replace(self.config, freeze_halted=True)) if halting else model

        def forward(variables: Any, tokens: jax.Array) -> jax.Array:
            output: Any = model.apply(variables, tokens, loops=self.loops, halting=self._halting)
            return output.logits

        self._forward = jax.jit(forward)
        self._mesh = make_mesh(workload.config.mesh, jax.devices()[:1])
        self._step = make_train_step(workload.config, self._mesh)
        self._batch = jax.device_put(batch_of(workload.config))  # the first rows of the workload's tokens: same seed
        self._state: TrainState | None = None  # made by the first train step, as the original's
        self._own_loop: Call | None = None  # likewise

    def logits(self) -> np.ndarray:
        return np.asarray(self.forward())

    def mean_loops(self, new_tokens: int) -> float:
        """Loops per decoded token, for one prompt."""
        return float(np.asarray(self.decode(1, new_tokens).loops).mean())

    def forward(self) -> jax.Array:
        return jax.block_until_ready(self._forward(self._variables, self._workload.tokens[: self._workload.rows, :-1]))

    def decode(self, rows: int, new_tokens: int) -> GenerateResult:
        prompts = self._workload.tokens[:rows, : self._workload.prompt]
        result = generate(
            self._decoder,
            self._variables,
            prompts,
            max_new_tokens=new_tokens,
            loops=self.loops,
            halting=self._halting,
        )
        return jax.block_until_ready(result)

    def train_step(self) -> None:
        if self._state is None:
            state = init_state(self._workload.config, self._mesh)
            # Each step donates the arrays of its state, so the state gets copies of the weights.
            copies = jax.tree.map(
                lambda x, initial: jax.device_put(np.array(x), initial.sharding), self._variables, state.variables
            )
            self._state = state.replace(variables=copies)
        self._state, metrics = self._step(self._state, self._batch, Constants())
        jax.block_until_ready((self._state, metrics))

    def own_train_step(self) -> None:
        """As a user writes it who has a loop of their own: `own_loop.train_step`."""
        if self._own_loop is None:
            self._own_loop = own_loop.train_step(self._workload.config, jax.tree.map(jnp.copy, self._variables))
        self._own_loop()


def make_sides(
    fields: dict[str, Any], *, rows: int, length: int, prompt: int, device: str, threads: int, halting: bool
) -> tuple[Original, Ours]:
    """Both sides: a newly initialised original of the config `fields`, and ours with its weights.

    halting: halt as configured; otherwise all loops run.
    """
    on_gpu = device == "gpu"
    if on_gpu and not torch.cuda.is_available():
        exit_with("--device: got gpu, but torch finds none here (it needs a CUDA build of torch)")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    original = OpenMythos(MythosConfig(**fields)).eval()
    if not halting:
        torch.nn.init.constant_(original.recurrent.act.halt.bias, NEVER_HALT)
    model_config, variables = _convert(original)
    config = config_of(model_config, Shape(rows, length))
    shape = (max(rows, 8), length + 1)  # decoding uses up to 8 rows
    tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, shape).astype(np.int32)
    workload = Workload(config, tokens, rows, prompt)
    return Original(original, workload, on_gpu), Ours(variables, workload, halting)


def _convert(original: OpenMythos) -> tuple[ModelConfig, Any]:
    """Its config and weights as ours."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save({"model": original.state_dict(), "cfg": original.cfg}, file)
        return load_pretrained(file)

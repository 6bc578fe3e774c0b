"""What depth does: a logit lens over the loops, and tokens that stop when they are done.

python examples/depth_and_halting.py runs/quickstart "def main"
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import mythos_jax
from mythos_jax import Halting, LanguageModel


def logit_lens(lm: LanguageModel, tokens_BT: jax.Array, loops: int) -> np.ndarray:
    """The most likely next token after every loop and position, [loops, T]: step through depth by hand."""
    model = lm.model.bind(lm.variables, rngs={"state": jax.random.key(0)})
    tokens, _ = model.begin(tokens_BT)
    best = []
    for t in range(loops):
        tokens, _, _ = model.loop(tokens, loops=loops, start=t, count=1)
        logits_BTV = model.finish(tokens).logits
        assert logits_BTV is not None
        best.append(logits_BTV[0].argmax(-1))
    return np.stack(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompt", nargs="?", default="import ")
    parser.add_argument("--loops", type=int, default=8)
    arguments = parser.parse_args()

    lm = mythos_jax.load(arguments.model)
    assert lm.tokenizer is not None
    tokens_BT = jnp.asarray([lm.tokenizer.encode(arguments.prompt)], jnp.int32)

    print(f"predicted after {arguments.prompt!r}, loop by loop:")
    for t, tokens_T in enumerate(logit_lens(lm, tokens_BT, arguments.loops)):
        print(f"  loop {t + 1}: {lm.tokenizer.decode([int(tokens_T[-1])])!r}")

    # The same model at several depths, and with a policy: a token stops when its state changes by less than the
    # threshold. Thresholds are traced, so a sweep over them compiles once.
    call = jax.jit(
        lambda variables, tokens_BT, halting: lm.model.apply(
            variables, tokens_BT, loops=arguments.loops, halting=halting, rngs={"state": jax.random.key(0)}
        )
    )
    for threshold in (0.3, 0.1, 0.03):
        out = call(lm.variables, tokens_BT, Halting("latent", threshold))
        print(f"latent:{threshold}: {float(out.loops.mean()):.2f} loops per token of the prompt")

    # Generation with the policy: later tokens see an exited token as it was when it exited, so nothing is recomputed.
    print(repr(lm.generate(arguments.prompt, loops=arguments.loops, halting="latent:0.1", max_new_tokens=16)))


if __name__ == "__main__":
    main()

"""Load a trained model and generate text with it.

    python examples/load_and_generate.py runs/quickstart "def main"

The first argument is a run directory of `mythos train`, a pretrained directory or file, or a Hugging Face id.
"""

import argparse

import mythos_jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompt", nargs="?", default="import ")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()

    lm = mythos_jax.load(arguments.model)
    c = lm.config.model
    print(f"{lm}: {c.prelude_layers} + {c.loop_layers} x {c.loops} loops + {c.coda_layers} layers, width {c.dim}")

    # Greedy, in pieces as they are decoded.
    for piece in lm.generate(arguments.prompt, max_new_tokens=arguments.max_new_tokens, stream=True):
        print(piece, end="", flush=True)
    print()

    # A list is one batch. Each text gets what it would get alone: to sample one text several times, give several seeds.
    samples = lm.generate(
        [arguments.prompt] * 3, max_new_tokens=arguments.max_new_tokens, temperature=0.8, top_p=0.95, seed=[1, 2, 3]
    )
    for sample in samples:
        print(f"--- {sample!r}")

    # What the model expects after the prompt: the logits of the last position.
    logits_TV = lm.logits(arguments.prompt)
    assert lm.tokenizer is not None
    best = [lm.tokenizer.decode([int(token)]) for token in logits_TV[-1].argsort()[::-1][:5]]
    print(f"most likely next tokens: {best}")


if __name__ == "__main__":
    main()

"""Decoding with weights stored as float32, bfloat16 and int8, and with transformers: one process, measured in turn.

    .venv-torch/bin/python -m benchmarks.storage [--model smollm2] [--batch 1,8] [--no-transformers]

Greedy, after a prompt of 16 tokens; the time of the first few tokens, prompt included, is taken off. Prints tokens per
second (median over the repeats, and their range) and the ratio to our float32 within each round. `transformers` runs
the same GGUF file in float32; it needs torch, which `make test-torch` installs.
"""

import argparse

from benchmarks.timing import median_and_range, print_header, print_row, ratios, seconds_of, use_cores

PROMPT, FIRST = 16, 8
KINDS = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"weights": "int8"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-transformers", action="store_true")
    args = parser.parse_args()
    use_cores(args.threads)

    import numpy as np

    import mythos_jax
    from mythos_jax.inference.generate import generate

    models = {name: mythos_jax.load(args.model, **keywords) for name, keywords in KINDS.items()}
    vocabulary = models["float32"].config.model.vocab_size
    theirs = None if args.no_transformers else transformers_model(args.model)
    print_header("batch", "weights", "tokens per second", "times float32")
    for batch in map(int, args.batch.split(",")):
        prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, PROMPT)).astype(np.int32)

        def ours(name, new_tokens, prompts=prompts):
            lm = models[name]
            generate(lm.model, lm.variables, prompts, max_new_tokens=new_tokens).tokens.block_until_ready()

        calls = {name: lambda n, name=name: ours(name, n) for name in models}
        if theirs is not None:
            calls["transformers"] = lambda n, prompts=prompts: transformers_tokens(theirs, prompts, n)
        seconds = {name: [] for name in calls}
        for turn in range(-1, args.repeats):  # the first turn compiles
            for name, call in calls.items():
                some, all_of_them = (seconds_of(lambda n=n, call=call: call(n)) for n in (FIRST, args.new_tokens))
                if turn >= 0:
                    seconds[name].append(all_of_them - some)
        count = batch * (args.new_tokens - FIRST)
        for name, times in seconds.items():
            speed = [count / time for time in times]
            relative = median_and_range(ratios(seconds["float32"], times), digits=2)
            print_row(batch, name, median_and_range(speed), relative)


def transformers_model(path):
    import torch
    from transformers import AutoModelForCausalLM

    from mythos_jax.porting.hub import resolve

    file = resolve(path)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def transformers_tokens(model, prompts, new_tokens):
    import torch

    with torch.inference_mode():
        tokens = torch.from_numpy(prompts.astype("int64"))
        model.generate(tokens, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)


if __name__ == "__main__":
    main()

"""Convert a model to and from PyTorch's layout, and fine-tune it.

    python examples/convert_and_finetune.py runs/quickstart --workdir runs/finetuned --sources docs

Any model will do: a run of ours, or weights of OpenMythos, Huginn or Parcae as a directory, a file or a Hugging Face
id. From the shell: `mythos convert`, and `mythos train --init-from`.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

import mythos_jax
from mythos_jax import Config, DataConfig, TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--workdir", type=Path, default=Path("runs/finetuned"))
    parser.add_argument("--sources", nargs="+", default=["README.md"], help="text to fine-tune on")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    # Export: config.json and model.safetensors, as Hugging Face lays a model out. "openmythos", "huginn" and "parcae"
    # write the files of those projects, for models that they can express.
    lm = mythos_jax.load(arguments.model)
    exported = arguments.workdir / "exported"
    mythos_jax.save_pretrained(exported, lm.config.model, lm.variables, format="mythos_jax")

    # Import: the same tensors, bit for bit.
    model_config, variables = mythos_jax.load_pretrained(exported)
    for ours, theirs in zip(jax.tree.leaves(lm.variables["params"]), jax.tree.leaves(variables["params"]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    print(f"{exported}: {sum(x.size for x in jax.tree.leaves(variables['params'])):,} parameters, bit-identical")

    # Fine-tune: the config of a run, with the model's own shape and a small learning rate, started from its weights.
    config = Config(
        name="finetuned",
        model=dataclasses.replace(model_config, remat="none"),
        training=TrainingConfig(
            steps=arguments.steps, batch_size=4, learning_rate=1e-4, schedule="constant", warmup_steps=1
        ),
        data=DataConfig(
            path=str(arguments.workdir / "data"),
            sources=tuple(arguments.sources),
            seq_len=min(64, model_config.max_seq_len),
            held_out_fraction=0.0,
        ),
    )
    metrics = mythos_jax.train(config, arguments.workdir / "run", init_from=exported)
    print(f"fine-tuned for {metrics['step']} steps: loss {metrics['loss']:.3f} nats per token")


if __name__ == "__main__":
    main()

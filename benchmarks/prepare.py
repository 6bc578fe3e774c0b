"""How fast `mythos data prepare` tokenizes on one core, beside Hugging Face's `datasets.map` with the same tokenizer.

    pip install datasets && python -m benchmarks.prepare --tokenizer tokenizer.json TEXT.jsonl [TEXT.jsonl …]

Each side runs in a process of its own, on one core, with one thread of the tokenizer, in turns; its user and system
time is what counts, because other programs may run on the machine. `datasets` loads the file into its cache, and writes
the ids of each document; `mythos` also cuts them into rows, writes these with checks, and reads them back.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def ours(sources: list[str], tokenizer: str, folder: Path) -> int:
    from mythos_jax.data.prepare import prepare

    options = {"seq_len": 1024, "held_out_fraction": 0.05, "workers": 1, "progress": False}
    manifest = prepare(sources, folder / "out", tokenizer=tokenizer, **options)
    return sum(split.tokens - split.documents for split in manifest.splits.values())


def theirs(sources: list[str], tokenizer: str, folder: Path) -> int:
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    backend = Tokenizer.from_file(tokenizer)
    backend.encode_special_tokens = True

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [found.ids for found in backend.encode_batch(batch["text"], add_special_tokens=False)]}

    data = datasets.load_dataset("json", data_files=sources, split="train", cache_dir=str(folder))
    tokenized = data.map(encode, batched=True, remove_columns=data.column_names)
    return sum(len(ids) for batch in tokenized.with_format("arrow").iter(1000) for ids in batch["ids"])


SIDES = {"mythos": ours, "datasets": theirs}


def run_side(name: str, sources: list[str], tokenizer: str) -> None:
    """Prints [seconds of this process, without what it imported, and of the clock; tokens]."""
    import numpy  # noqa: F401
    import tokenizers  # noqa: F401

    if name == "mythos":
        import mythos_jax.data.prepare  # noqa: F401
    else:
        import datasets  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        tokens = SIDES[name](sources, tokenizer, Path(folder))
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(json.dumps([used, time.monotonic() - begin, tokens]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.sources, arguments.tokenizer)
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    lines = (line for file in arguments.sources for line in Path(file).read_bytes().splitlines())
    text = sum(len(json.loads(line)["text"].encode()) for line in lines)
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, list[list[float]]] = {name: [] for name in SIDES}
    for _ in range(arguments.rounds):
        for name in SIDES:
            command = [sys.executable, "-m", "benchmarks.prepare", *sys.argv[1:], "--side", name]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name].append(json.loads(output.splitlines()[-1]))
    print(f"{text / 1e6:.1f} MB of text, load {os.getloadavg()[0]:.1f}")
    print("| | MB/s of the core's time | tokens/s | clock, s | tokens |\n|---|---|---|---|---|")
    for name, runs in found.items():
        used, clock = (statistics.median(column) for column in list(zip(*runs, strict=True))[:2])
        tokens = int(runs[0][2])
        print(f"| {name} | {text / used / 1e6:.2f} | {tokens / used:,.0f} | {clock:.1f} | {tokens:,} |")


if __name__ == "__main__":
    main()

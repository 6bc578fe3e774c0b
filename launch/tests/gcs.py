"""A run whose directory, data and compiled programs are under gs://, tested against an emulator of Cloud Storage.

    pip install gcsfs gcp-storage-emulator && python launch/tests/gcs.py

Prepares rows on this disk, copies them to the bucket, trains to step 4, resumes to step 8, evaluates; then compares
with the same run on this disk. Before that, compares the batches of 1, 3 and 64 shards that 1, 2 and 8 processes read,
from the bucket and from this disk, and the bytes that they read.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

PORT = 9123
TINY = """
model: {vocab_size: 264, dim: 32, max_seq_len: 32, loops: 2, n_heads: 2, n_kv_heads: 1, hidden_dim: 48}
training: {batch_size: 8, checkpoint_every: 3, log_every: 1, warmup_steps: 2}
evaluation: {batch_size: 8, max_rows: 16, loops: [1, 2]}
data: {seq_len: 16, held_out_fraction: 0.2}
"""


def with_generations(objects: Any) -> None:
    """Adds the object's generation to the emulator's downloads, as Cloud Storage does and TensorStore requires."""
    original = objects.download

    def download(request: Any, response: Any, storage: Any, *rest: Any, **keywords: Any) -> None:
        with contextlib.suppress(Exception):  # a missing object: `original` reports it
            info = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = str(info["generation"])
        original(request, response, storage, *rest, **keywords)

    objects.download = download


def main() -> int:
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server

    with_generations(objects)
    folder = Path(tempfile.mkdtemp())
    server = create_server("127.0.0.1", PORT, in_memory=True, default_bucket="bucket")
    server.start()
    url = f"http://127.0.0.1:{PORT}"
    os.environ |= {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs: config, log, data, compiled programs
        "TENSORSTORE_GCS_HTTP_URL": url,  # Orbax's arrays
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks Google for the kind of each bucket
        "JAX_PLATFORMS": "cpu",
        "MYTHOS_DATA_CACHE": str(folder / "cache"),
    }
    try:
        check_rows(folder)
        return check(folder)
    finally:
        server.stop()


def check_rows(folder: Path) -> None:
    import numpy as np

    from mythos_jax.data.fetch import local_folder
    from mythos_jax.data.prepare import prepare
    from mythos_jax.paths import copy_tree, to_path

    text = folder / "letters.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 123, 1_500_000, dtype=np.uint8).tobytes())
    expected = None
    for shards in (1, 3, 64):
        out, url = folder / f"rows{shards}", f"gs://bucket/rows{shards}"
        size = 2106 * (1320 // shards + 1)  # 1319 rows of 1024 tokens
        prepare([str(text)], out, seq_len=1024, held_out_fraction=0.1, shard_bytes=size, progress=False)
        copy_tree(out, to_path(url))
        for processes in (1, 2, 8):
            for where in (out, local_folder(url)):
                batches, ratio = read_batches(where, processes)
                expected = batches if expected is None else expected
                if not np.array_equal(batches, expected) or ratio > 1.1:
                    raise SystemExit(f"{where}, {processes} processes: other batches, or {ratio:.4f} times their bytes")
                print(
                    f"{shards} shards, {processes} processes, {where}: read {ratio:.4f} times the bytes of their rows"
                )


def read_batches(folder: Path, processes: int, steps: int = 6, size: int = 32) -> tuple[Any, float]:
    """The tokens of the first batches, and how many times the bytes of its rows' tokens a process reads at most."""
    import numpy as np

    from mythos_jax.data import stored_rows
    from mythos_jax.data.pipeline import train_batches
    from mythos_jax.data.storage import Storage

    opened: list[Storage] = []

    class Counted(Storage):
        def __init__(self, path: str | Path):
            super().__init__(path)
            opened.append(self)

    parts, ratio, count = [], 0.0, size // processes
    for process in range(processes):
        rows = slice(process * count, (process + 1) * count)
        with mock.patch.multiple(stored_rows, Storage=Counted, _cache=stored_rows._Cache()):
            batches = train_batches(folder, batch_size=size, seed=7, rows=rows, threads=0)
            parts.append([batch["tokens"] for batch in itertools.islice(batches, steps)])
        ratio = max(ratio, opened[-1].bytes_read / (steps * count * 1025 * 2))
    return np.concatenate(parts, axis=1), ratio


def check(folder: Path) -> int:
    from mythos_jax.paths import copy_tree, to_path

    (folder / "tiny.yaml").write_text(TINY)
    source = Path(__file__).parents[2] / "docs"
    mythos(
        "data",
        "prepare",
        str(source),
        "--out",
        str(folder / "data"),
        "--seq-len",
        "16",
        "--held-out-fraction",
        "0.2",
        "--shard-bytes",
        "200000",
    )
    copy_tree(folder / "data", to_path("gs://bucket/data"))
    run = to_path("gs://bucket/runs/tiny")
    train = ["train", str(folder / "tiny.yaml"), "--data.path"]
    remote = ["gs://bucket/data", "--workdir", str(run), "--compilation-cache", "gs://bucket/compiled"]
    mythos(*train, *remote, "--training.steps", "4")
    mythos(*train, *remote, "--training.steps", "8")
    mythos("eval", str(run))
    local = folder / "runs"
    for steps in ("4", "8"):
        mythos(*train, str(folder / "data"), "--workdir", str(local), "--training.steps", steps)
    texts = [(directory / "metrics.jsonl").read_text() for directory in (run, local)]
    logs = [[json.loads(line)["loss"] for line in text.splitlines()] for text in texts]
    print("gs:// ", sorted(str(path.relative_to(run)) for path in run.iterdir()), "compiled programs:", end=" ")
    print(len(list(to_path("gs://bucket/compiled").iterdir())))
    print("losses", logs)
    return 0 if len(logs[0]) == 8 and logs[0] == logs[1] else 1


def mythos(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "mythos_jax", *words, "--debug"], check=True)


if __name__ == "__main__":
    sys.exit(main())

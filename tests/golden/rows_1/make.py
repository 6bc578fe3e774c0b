"""Made rows.tar.gz with commit 54263b7, the last one that wrote rows in version 1: `PYTHONPATH=… python make.py`.

It holds two prepared folders, what they were made from, and the batches that were read from them then.
"""

import itertools
import json
import tarfile
from pathlib import Path

import numpy as np

from mythos_jax.data.pipeline import eval_batches, train_batches
from mythos_jax.data.prepare import prepare

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
texts = [{"text": f"Document {i} of the old folder says {'word ' * (i % 7)}and ends."} for i in range(40)]
chats = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} plus {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}."},
        ]
    }
    for i in range(30)
]
for name, records in (("text", texts), ("chat", chats)):
    Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
Path("t.jinja").write_text(TEMPLATE)
prepare(["text.jsonl"], "text", seq_len=32, held_out_fraction=0.2)
prepare(["chat.jsonl"], "chat", seq_len=96, held_out_fraction=0.2, chat=True, chat_template="t.jinja")
arrays = {}
for name in ("text", "chat"):
    trained = itertools.islice(train_batches(name, batch_size=4, seed=3, threads=0), 12)
    for split, batches in (("train", trained), ("held_out", eval_batches(name, batch_size=4))):
        arrays |= {f"{name}/{split}/{i}/{key}": value for i, b in enumerate(batches) for key, value in b.items()}
np.savez_compressed("batches.npz", **arrays)
with tarfile.open("rows.tar.gz", "w:gz") as archive:
    for name in ("text", "chat", "batches.npz", "text.jsonl", "chat.jsonl", "t.jinja"):
        archive.add(name)

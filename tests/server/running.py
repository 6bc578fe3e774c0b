"""A server with the fake engine, on a free port of this machine, in a thread.

`python -m tests.server.running` serves until Ctrl-C, for a look at the page.
"""

import contextlib
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mythos_jax.config import Config, DataConfig
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel
from mythos_jax.server.model import served_model
from mythos_jax.server.protocol import ConnectionLimits
from mythos_jax.server.run import Server, address_of, bind
from mythos_jax.server.service import Service
from mythos_jax.sharding import default_mesh, make_mesh
from tests import talker, tokenizer_kinds
from tests.serving.fake_engine import FakeEngine

NAME = "tiny"


@cache
def talking_model() -> LoadedModel:
    """One without weights: a tokenizer and a chat template are all that the server needs of it."""
    with tempfile.TemporaryDirectory() as folder:
        spec = tokenizer_kinds.save("byte_level", Path(folder))
        settings = {"eos_token": tokenizer_kinds.END, "chat_template": talker.CHATML}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        config = replace(talker.CONFIG, loops=4)
        loaded = LoadedModel(
            directory=Path(folder),
            config=Config(model=config, data=DataConfig(seq_len=1)),
            model=Mythos(config),
            variables={},
            step=None,
            mesh=make_mesh(default_mesh()),
            tokenizer_spec=spec,
        )
        assert loaded.conventions.chat_template  # which is read only now
    return loaded


def fake_service(engine: FakeEngine | None = None, loaded: LoadedModel | None = None, **fields: Any) -> Service:
    engine = engine or FakeEngine()
    model = served_model(loaded or talking_model(), [NAME], max_loops=engine.loops, max_length=engine.max_length)
    return Service(engine, model, **fields)


@dataclass
class Running:
    service: Service
    engine: FakeEngine
    server: Server
    url: str
    address: tuple[str, int]
    thread: threading.Thread


@contextlib.contextmanager
def running(
    service: Service, drain_seconds: float = 60, port: int = 0, limits: ConnectionLimits | None = None
) -> Iterator[Running]:
    """The server's own loop, in a thread; it ends with the block."""
    engine: Any = service.engine
    listener: socket.socket = bind("127.0.0.1", port)
    server = Server(service, limits or ConnectionLimits(), engine.start, drain_seconds, address_of(listener))
    server.config.timeout_graceful_shutdown = 30  # a busy machine may take its time for the last answers
    service.state = "starting"
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    address = listener.getsockname()[:2]
    found = Running(service, engine, server, address_of(listener), address, thread)
    thread.start()
    try:
        while (service.state == "starting" or server.is_starting) and thread.is_alive():  # it has said so, too
            thread.join(0.005)
        yield found
    finally:
        server.should_exit = True
        thread.join(60)
        engine.close(drain=False)


if __name__ == "__main__":
    with running(fake_service(FakeEngine(delay=0.08)), port=8000) as shown:
        print(shown.url)
        with contextlib.suppress(KeyboardInterrupt):
            shown.thread.join()

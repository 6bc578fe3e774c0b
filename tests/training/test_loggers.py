"""What the loggers write, across restarts of a run."""

import json
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mythos_jax.errors import ConfigError
from mythos_jax.training.loggers import PACKAGES, JsonlLogger, TensorBoardLogger, check_loggers
from mythos_jax.training.metrics import to_json


def test_jsonl_drops_the_lines_after_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonlLogger(path)
    for step in range(1, 6):
        log.write(step, {"loss": to_json(np.float32(step)), "expert_load": to_json(np.full((1, 2), 0.5))})
    log.close()
    path.open("a").write('{"step": 6, "lo')
    log = JsonlLogger(path, restored_step=3)
    log.write(4, {"loss": 0.0})
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["expert_load"] == [[0.5, 0.5]]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed; allowed: pip install 'mythos-jax\[{name}\]'"):
        check_loggers((name,))


def read_events(folder):
    """All events of a folder in the order in which TensorBoard reads them."""
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data)
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def shown_scalars(folder):
    """(tag, step, value) of what TensorBoard shows: a START event hides earlier events of its step and later steps."""
    scalars = []
    for event in read_events(folder):
        if event.session_log.status == SessionLog.START:
            scalars = [scalar for scalar in scalars if scalar[1] < event.step]
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return scalars


@pytest.mark.parametrize(("restored", "expected"), [(2, [2.0, 3.0, 13.0, 14.0]), (0, [11.0, 12.0, 13.0, 14.0])])
def test_tensorboard_hides_the_steps_that_run_again(tmp_path, restored, expected):
    """A run that logged steps 1 to 3 is killed and resumes after step 2; or after none, if it had saved nothing."""
    for start, stop, offset in [(0, 3, 1.0), (restored, 4, 10.0)]:
        logger = TensorBoardLogger(tmp_path, restored_step=start)
        for step in range(start + 1, stop + 1):
            logger.write(step, {"loss": step + offset, "expert_load": [[0.5, 0.5]]})
        logger.close()
    assert shown_scalars(tmp_path) == [("loss", step, value) for step, value in enumerate(expected, start=1)]

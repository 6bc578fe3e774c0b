"""What the loggers write, across restarts of a run."""

import json
import re
import struct
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mythos_jax.errors import ConfigError, TrainingError
from mythos_jax.training.loggers import PACKAGES, JsonlLogger, TensorBoardLogger, _wandb_id, check_loggers
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


def test_damaged_lines_of_a_log_are_left_out_and_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "loss": 2.5}', b'{"step": 2, "loss": null}', b'{"step": 3}']
    damaged = [b"\xff\xfe", b'{"step": 2, "lo', b"[" * 100_000, b'{"step": "2"}', b'{"step": NaN}', b"7", b""]
    path.write_bytes(b"\n".join([good[0], *damaged, *good[1:], b'{"step": 4, "lo']))
    JsonlLogger(path, restored_step=2).close()
    assert path.read_bytes() == b"\n".join([*good[:2], b""])
    assert capsys.readouterr().err == f"{path}: left out what is damaged, 7 lines (2, 3, 4, 5, 6, …)\n"


def test_nan_and_infinity_are_null(tmp_path):
    log = JsonlLogger(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": float("nan"), "expert_load": [[0.5, -float("inf")], [float("inf")]], "skipped": 3})
    log.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row.pop("time") == pytest.approx(time.time(), abs=60)
    assert row == {"step": 1, "loss": None, "expert_load": [[0.5, None], [None]], "skipped": 3}


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = JsonlLogger(tmp_path / "metrics.jsonl")
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  closed by the logger
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        log.write(1, {"loss": 1.0})
    log.close()


@pytest.mark.parametrize("stored", [b"\xff\xfe", b"", b"../../x", b"0123456789abcdef"])
def test_the_id_at_wandb_is_kept_unless_it_is_damaged(tmp_path, stored):
    (tmp_path / "wandb_id").write_bytes(stored)
    first = _wandb_id(tmp_path / "wandb_id")
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert _wandb_id(tmp_path / "wandb_id") == first
    assert (first.encode() == stored) == (len(stored) == 16)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed; allowed: pip install '\.\[{name}\]' in the"):
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

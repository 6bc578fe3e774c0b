"""Which fields may change when a run resumes, and what is printed about them."""

import json
import types
from dataclasses import replace
from pathlib import Path

import pytest

from mythos_jax.config import Config, DataConfig, DepthConfig, ModelConfig, TaskConfig, TrainingConfig
from mythos_jax.errors import ConfigError
from mythos_jax.training.resume import announce_changes, changed_fields, check_resume, checkpoint_metadata
from mythos_jax.typed import to_dict

RUN = Path("runs/x")


def metadata(**training):
    config = Config(training=TrainingConfig(steps=100, warmup_steps=10, **training))
    return checkpoint_metadata(config, types.SimpleNamespace(identity="rows", tokenizer=None))


def test_a_field_that_an_older_checkpoint_lacks_has_its_default():
    saved = metadata()
    del saved["model"]["expert_exchange"], saved["model"]["dtype"], saved["training"]["ema_decay"]
    del saved["training"]["objectives"]
    assert changed_fields(saved, metadata()) == {}
    check_resume(saved, metadata(), RUN)
    assert changed_fields(saved, metadata(ema_decay=0.9)) == {"training.ema_decay": (0.0, 0.9)}


def test_a_run_of_version_0_1_0_is_resumed_with_the_settings_that_it_had():
    """The file is the metadata of a checkpoint that the code at 47a166a wrote, before fields were renamed and added."""
    saved = json.loads((Path(__file__).parents[1] / "golden" / "checkpoint_0_1_0.json").read_text(encoding="utf-8"))
    assert "output_init" not in saved["model"]
    assert saved["training"]["accumulation"] == 2
    model = ModelConfig(dim=32, max_seq_len=64, loops=2, n_heads=2, n_kv_heads=2, hidden_dim=64)
    training = TrainingConfig(
        steps=5,
        batch_size=4,
        warmup_steps=2,
        checkpoint_every=5,
        log_every=1,
        grad_accumulation_steps=2,
        final_learning_rate_fraction=0.2,
        depth=DepthConfig(sample_per="batch"),
    )

    def current(**fields):
        config = Config(model=replace(model, **fields), training=training, data=DataConfig(seq_len=32))
        return checkpoint_metadata(config, types.SimpleNamespace(identity=saved["data"], tokenizer=None))

    assert changed_fields(saved, current()) == {}
    check_resume(saved, current(), RUN)
    for field, value in {"output_init": 0.5, "dtype": "bfloat16"}.items():
        with pytest.raises(ConfigError, match=rf"model\.{field} was .*, is {value!r}"):
            check_resume(saved, current(**{field: value}), RUN)


def test_a_task_field_that_an_older_checkpoint_lacks_has_its_default():
    task = to_dict(TaskConfig("parity", (4,)))
    saved, current = metadata() | {"data": {"task": dict(task)}}, metadata() | {"data": {"task": task}}
    del saved["data"]["task"]["answers"]
    check_resume(saved, current, RUN)
    current["data"] = {"task": {**task, "answers": "last"}}
    with pytest.raises(ConfigError, match=r"data\.task\.answers was 'every', is 'last'"):
        check_resume(saved, current, RUN)


def test_a_model_field_that_this_version_does_not_know_is_refused():
    saved = metadata()
    saved["model"]["wormhole"] = 1
    with pytest.raises(ConfigError, match=r"runs/x: cannot resume, .*model\.wormhole was 1, is None"):
        check_resume(saved, metadata(), RUN)


def test_fields_that_affect_only_speed_may_change():
    saved, current = metadata(), metadata()
    current["model"] |= {"remat": "full", "expert_exchange": "all_to_all"}
    check_resume(saved, current, RUN)
    current["model"]["rope_theta"] = 5e4
    with pytest.raises(ConfigError, match=r"model\.rope_theta was 10000\.0, is 50000\.0\); use a new --workdir"):
        check_resume(saved, current, RUN)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cosine", ": the learning rate's cosine now ends at step 200, and is followed from step 40 on"),
        ("wsd", ": the learning rate now decays from step 160 to step 200"),
        ("constant", ": the learning rate does not depend on it"),
    ],
)
def test_what_more_steps_do_to_the_learning_rate_is_announced(capsys, schedule, message):
    saved = metadata(schedule=schedule)
    current = metadata(schedule=schedule)
    current["training"]["steps"] = 200
    announce_changes(saved, current, step=40)
    assert capsys.readouterr().err == f"training.steps was 100, is now 200{message}\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # 1 + 4 step / length: of 40 steps, then of 80.
        ({"curriculum_fraction": 0.4}, {"curriculum_fraction": 0.4}, "was 5, is now 3, and rises until step 80"),
        ({"curriculum_steps": 40}, {"curriculum_steps": 40}, ""),  # does not depend on the number of steps
        ({"curriculum_steps": 80}, {"curriculum_steps": 160}, "was 3, is now 2, and rises until step 160"),
        ({"curriculum_steps": 80}, {"curriculum_steps": 20}, "was 3, is now 5"),
    ],
)
def test_what_more_steps_do_to_the_depth_is_announced(capsys, old, new, message):
    saved, current = (
        metadata(depth=DepthConfig(distribution="poisson", mean_loops=5, **fields)) for fields in (old, new)
    )
    current["training"]["steps"] = 200
    announce_changes(saved, current, step=40)
    lines = [line for line in capsys.readouterr().err.splitlines() if "mean depth" in line]
    assert lines == ([f"the mean depth at step 40 {message}"] if message else [])


def test_nothing_is_announced_where_nothing_changed(capsys):
    announce_changes(metadata(), metadata(), step=40)
    assert capsys.readouterr().err == ""

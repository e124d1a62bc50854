"""vipo.changes: what a resumed run may change."""

import pytest
import yaml

from vipo import Config
from vipo.changes import FREE, REFUSED, check_changes
from vipo.config import fields


def saved(**sections):
    return yaml.safe_load(Config.from_mapping(sections).to_yaml())


def test_every_key_that_has_a_rule_exists():
    assert set(REFUSED) | FREE <= {key for key, _, _ in fields()}


def test_what_changes_no_iteration_is_free():
    new = Config.from_mapping({"run": {"output": "moved", "iterations": 99, "keep": 5, "save_every": 7}})
    assert check_changes(saved(), new, allow=False) == []
    stopping = saved(watch={"every": 2, "rewards": ["brightness"], "stop": True})
    assert check_changes(stopping, Config.from_mapping({"watch": {"every": 1, "seeds": 4}}), allow=False) == []


def test_what_is_wrong_is_refused_even_when_changes_are_allowed():
    old = saved(model={"lora_rank": 8}, prompts={"group_size": 4}, optimizer={"learning_rate": 0.1})
    for allow in (False, True):
        with pytest.raises(ValueError) as error:
            check_changes(old, Config(), allow=allow)
        lines = str(error.value).splitlines()
        assert lines[0].startswith("--resume: model.lora_rank: 8 -> 16: refused, the saved weights are")
        assert lines[1].startswith("--resume: prompts.group_size: 4 -> 8: refused")
        assert lines[2:] == [] if allow else "optimizer.learning_rate: 0.1 -> 0.0003: put it back" in lines[2]


def test_the_rest_needs_leave_and_is_listed():
    old = saved(loss={"kl_beta": 0.5}, run={"threads": 2})
    old["run"].pop("keep_best")  # of an earlier version
    with pytest.raises(ValueError, match="loss.kl_beta: 0.5 -> 0.0: put it back, or give --allow-changes"):
        check_changes(old, Config(), allow=False)
    assert check_changes(old, Config(), allow=True) == ["loss.kl_beta: 0.5 -> 0.0", "run.threads: 2 -> None"]


def test_the_length_of_a_run_is_not_free_where_a_schedule_ends_with_it():
    new = Config.from_mapping({"optimizer": {"schedule": "linear"}, "run": {"iterations": 99}})
    with pytest.raises(ValueError, match="run.iterations: 50 -> 99"):
        check_changes(saved(optimizer={"schedule": "linear"}), new, allow=False)

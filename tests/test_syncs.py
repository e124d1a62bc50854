"""Nothing on the way of a training step waits for the device once per denoising step: bench/syncs.py counts."""

import pytest
import torch
from syncs import Syncs
from test_trainer import make

ON_THE_HOST = {
    "scheduling_flow_match_euler_discrete.py:__init__",
    "scheduler.py:set_timesteps",
    "generic.py:<lambda>",
    "pipeline_stable_diffusion_3.py:_get_t5_prompt_embeds",
}
"""Read what is on the host in any case: a scheduler's sigmas, a tokenizer's tokens."""


def reads(tmp_path, **sections):
    trainer = make(tmp_path, **sections)
    with Syncs() as syncs:
        trainer.step(0)
    return syncs.places


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: torch.equal(x, x.clone()),
        lambda x: f"{x.sum():.1f}",
        lambda x: x.numpy(),
    ],
)
def test_a_read_is_counted_once_and_where_it_is(read):
    x = torch.ones(3)
    with Syncs() as syncs:
        (x + 1).exp().sum()
        read(x)
    assert dict(syncs.places) == {"test_syncs.py:<lambda>": 1}


def test_more_steps_wait_no_more(tmp_path):
    few, many = (reads(tmp_path, sampling={"num_inference_steps": steps}) for steps in (3, 6))
    assert few == many
    assert few["types.py:require_finite"] == 3  # rewards, maps, gradient
    assert few["trainer.py:accumulate"] == 1  # losses


def test_micro_batches_wait_for_their_checks_only(tmp_path):
    whole, parts = reads(tmp_path), reads(tmp_path, sampling={"micro_batch": 2})
    # a rollout's latents and log-probs; the ranges of a map's frames and features, after all rollouts
    once_each = {"types.py:require_finite_steps", "__init__.py:features"}
    assert all(parts[place] == 3 * whole[place] > 0 for place in once_each)
    assert {place for place in parts if parts[place] > whole[place]} <= ON_THE_HOST | once_each

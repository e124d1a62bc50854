"""Memory stays flat: the objects that a run holds do not grow with its iterations. bench/soak.py measures bytes."""

import gc

import numpy as np
import pytest
import torch
from soak import slope

from vipo import Config, Trainer


def living_tensors():
    """Number and bytes of the tensors that are alive."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return len(found), sum(tensor.numel() * tensor.element_size() for tensor in found)


def test_no_tensor_outlives_its_iteration(tmp_path):
    config = Config.from_mapping(
        {
            "prompts": {"per_iteration": 1, "group_size": 2},
            "sampling": {"num_inference_steps": 2},
            "loss": {"kl_beta": 0.1},
            "run": {"output": str(tmp_path / "run"), "iterations": 4, "save_every": 1, "sample_every": 1},
        }
    )
    counts = []
    Trainer(config).run(on_iteration=lambda iteration, metrics: counts.append(living_tensors()))
    assert counts[1] == counts[2] == counts[3]  # the first makes the optimizer's moments


def test_the_slope_of_a_trace():
    iterations = np.arange(200)
    noise = np.random.default_rng(0).normal(size=200)
    mean, low, high = slope(iterations, 500 + 0.5 * iterations + noise)
    assert low < 50 < high and mean == pytest.approx(50, abs=1)
    mean, low, high = slope(iterations, 500 + noise)
    assert low < 0 < high and high - low < 3
    with pytest.raises(ValueError, match="give more --minutes"):
        slope(iterations[:9], noise[:9])

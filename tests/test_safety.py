"""Non-finite tensors: the first bad one is named and bundled, weights and moments stay as they were."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import brightness, make, numbers, weights

from vipo import Config, safety
from vipo.checkpoint import list_checkpoints
from vipo.runlog import read_metrics
from vipo.types import NonFiniteError, require_finite


def poison_denoiser(trainer, when):
    """Make the denoiser's output NaN for the second sample, whenever `when(is a replay)`."""

    def hook(module, args, output):
        if not when(torch.is_grad_enabled()):
            return output
        bad = torch.ones_like(output[0])
        bad[1] = float("nan")
        return (output[0] * bad, *output[1:])

    return trainer.policy.denoiser.register_forward_hook(hook)


def poison_gradient(trainer, which):
    """Make the gradient of one parameter infinite."""
    name = list(trainer.policy.trainable_parameters())[which]
    trainer.parameters[which].register_hook(lambda gradient: gradient / 0)
    return name


def bundle_of(tmp_path, iteration=1):
    folder = tmp_path / "run" / "debug" / f"iteration_{iteration:06d}"
    assert sorted(path.name for path in folder.iterdir()) == ["bundle.json", "config.yaml", "tensors.safetensors"]
    return json.loads((folder / "bundle.json").read_text()), load_file(folder / "tensors.safetensors"), folder


@pytest.mark.parametrize(
    ("replayed", "name"),
    [(False, "latents after step 0 of the rollout"), (True, "log-prob of step 0")],
)
def test_a_bad_denoiser_is_caught_where_it_first_shows(tmp_path, replayed, name):
    trainer = make(tmp_path)
    before = weights(trainer).clone()
    poison_denoiser(trainer, lambda replay: replay == replayed)
    with pytest.raises(FloatingPointError, match=f"iteration 1: {name} is not finite: first bad .* prompt"):
        trainer.run()
    assert torch.equal(weights(trainer), before) and not trainer.optimizer.state
    record, tensors, folder = bundle_of(tmp_path)
    batch = trainer.rollouts.batch(0)
    assert (record["tensor"], record["step"], record["iteration"]) == (name, 0, 1)
    assert record["first_bad_index"][0] == 1 and record["micro_batch"]["prompts"] == batch.prompts
    assert f"prompt {batch.prompts[1]!r}" in record["message"]
    assert (record["seeds"], record["initial_seeds"]) == (batch.seeds, batch.initial_seeds)
    assert record["bad_elements"] == int((~torch.isfinite(tensors["bad"])).sum()) > 0
    assert {"latents", "next_latents", "old_log_probs"} <= set(tensors)
    if replayed:
        assert {"maps.0", "rewards", "group_advantages", "advantages"} <= set(tensors)
        assert torch.isfinite(tensors["old_log_probs"]).all() and not torch.isfinite(tensors["log_probs"]).all()
    assert Config.from_yaml(folder / "config.yaml") == trainer.config
    assert not (tmp_path / "run" / "config.yaml").exists()  # no run was begun


def test_a_bad_gradient_names_the_parameter(tmp_path):
    trainer = make(tmp_path)
    before = weights(trainer).clone()
    name = poison_gradient(trainer, 2)
    with pytest.raises(FloatingPointError, match=f"gradient of {name} is not finite"):
        trainer.run()
    assert torch.equal(weights(trainer), before) and not trainer.optimizer.state
    record, tensors, _ = bundle_of(tmp_path)
    assert record["gradients"]["parameter"] == name and record["gradients"]["bad"] == 1
    assert torch.equal(tensors["weight"], trainer.parameters[2]) and not torch.isfinite(tensors["bad"]).all()


def test_gradients_that_are_finite_but_overflow_their_norm_stop_too():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3e38)
    norm = torch.nn.utils.get_total_norm([parameter.grad])
    with pytest.raises(NonFiniteError, match="gradient norm is not finite") as caught:
        safety.require_finite_gradients({"w": parameter}, norm)
    assert caught.value.evidence["gradients"] == pytest.approx(
        {"parameters": 1, "bad": 0, "parameter": "w", "largest_finite": 3e38}
    )


def test_frames_rewards_features_and_weights_are_named(tmp_path):
    def bad(frames, prompts):
        return torch.where(torch.arange(len(frames)) == 4, torch.nan, brightness(frames, prompts))

    with pytest.raises(FloatingPointError, match="reward 'nano' returned nan for sample 4 of 6, prompt .* bundle: "):
        make(tmp_path, reward=bad).run()
    record, tensors, _ = bundle_of(tmp_path)
    assert record["first_bad_index"] == [0, 4] and tensors["frames.0"].shape == (6, 1, 3, 32, 32)
    with pytest.raises(FloatingPointError, match="the backbone's features are not finite, .* bundle: "):
        make(tmp_path, backbone=lambda frames: torch.full((*frames.shape[:2], 4, 4, 3), torch.nan)).run()
    record, tensors, _ = bundle_of(tmp_path)
    assert record["tensor"] == "features of the map's backbone" and "rewards" in tensors
    trainer = make(tmp_path)
    trainer.policy.pipeline.vae.decoder.conv_out.register_forward_hook(lambda module, args, out: out * torch.nan)
    with pytest.raises(FloatingPointError, match="decoded frames is not finite"):
        trainer.run()
    trainer = make(tmp_path, run={"iterations": 1})
    trainer.optimizer.register_step_post_hook(lambda *a: trainer.parameters[1].data.fill_(torch.inf))
    with pytest.raises(FloatingPointError, match="iteration 1: weight .* is not finite: .* bundle: "):
        trainer.run()
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


def test_a_large_bad_tensor_is_cut_to_its_sample_and_the_rest_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(safety, "LARGEST_BUNDLE", 4000)
    trainer = make(tmp_path)
    poison_denoiser(trainer, lambda replay: replay)
    with pytest.raises(FloatingPointError):
        trainer.run()
    record, tensors, _ = bundle_of(tmp_path)
    assert len(tensors["bad"]) == 1 and record["shape"][0] == 6 and not torch.isfinite(tensors["bad"]).all()
    assert "latents" in record["left_out"] and sum(t.nbytes for t in tensors.values()) <= 4000


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_skipped_iteration_leaves_weights_and_moments_as_they_were(tmp_path, caplog, updates, failing):
    """The last update of the failing iteration is bad; the next iterations are those of a run that never met it."""
    optimizer = {"updates_per_rollout": updates, "skip_nonfinite": 1, "learning_rate": 1e-2, "ema": 0.5}
    trainer = make(tmp_path, optimizer=optimizer)
    step, states = trainer.step, []

    def watched(iteration):
        averages = {("ema", i): value.clone() for i, value in enumerate(trainer.ema.values)}
        states.append((weights(trainer).clone(), numbers_of(trainer.optimizer) | averages))
        count = 0

        def hook(gradient):
            nonlocal count
            count += 1
            return gradient * torch.nan if iteration == failing and count == 3 else gradient

        handle = trainer.parameters[0].register_hook(hook)
        try:
            return step(iteration)
        finally:
            handle.remove()

    trainer.step = watched
    with caplog.at_level(logging.WARNING, logger="vipo"):
        trainer.run()
    assert "skipped 1 of at most 1: iteration" in caplog.text and "debug bundle: " in caplog.text
    bundle_of(tmp_path, failing + 1)
    before, after = states[failing], states[failing + 1]
    assert torch.equal(before[0], after[0]) and before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][key], after[1][key]) for key in before[1])
    lines = read_metrics(tmp_path / "run")
    assert [line.get("skipped", 0) for line in lines] == [int(i == failing) for i in range(3)]
    assert [line["skipped_iterations"] for line in lines] == [int(i >= failing) for i in range(3)]


def numbers_of(optimizer):
    state = optimizer.state_dict()["state"]
    return {(i, key): value.clone() for i, entry in state.items() for key, value in entry.items()}


def test_a_count_that_is_no_tensor_is_undone_too():
    """As bitsandbytes has it, and torch's SparseAdam."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SparseAdam([weight])
    weight.grad = torch.ones(2).to_sparse()
    optimizer.step()
    before = weight.detach().clone()
    with pytest.raises(NonFiniteError), safety.undone_if_not_finite(optimizer, True):
        optimizer.step()
        require_finite("loss", torch.tensor(float("nan")))
    assert optimizer.state[weight]["step"] == 1 and torch.equal(weight, before)


def test_the_limit_of_skipped_iterations_holds_over_a_resume(tmp_path):
    optimizer = {"skip_nonfinite": 1}
    first = make(tmp_path, optimizer=optimizer, run={"iterations": 2, "save_every": 1})
    step = first.step
    first.step = lambda iteration: step(iteration) if iteration == 0 else fail(iteration)
    first.run()
    plain = make(tmp_path, run={"iterations": 1, "output": str(tmp_path / "plain")})
    plain.run()
    assert torch.equal(weights(first), weights(plain))
    resumed = make(tmp_path, optimizer=optimizer, run={"iterations": 3})
    resumed.step = fail
    message = r"iteration 3: latents is not finite: .* \(optimizer.skip_nonfinite: 1 iterations were skipped\)"
    with pytest.raises(FloatingPointError, match=message):
        resumed.run(mode="resume")


def fail(iteration):
    require_finite("latents", torch.tensor([torch.nan]), ["a red cat"])


def test_a_run_that_may_skip_is_the_run_that_may_not(tmp_path):
    runs = []
    for limit in (0, 2):
        trainer = make(
            tmp_path,
            optimizer={"skip_nonfinite": limit, "updates_per_rollout": 2},
            run={"output": str(tmp_path / f"{limit}")},
        )
        trainer.run()
        lines = [numbers(line) for line in read_metrics(tmp_path / f"{limit}")]
        runs.append(
            ([{k: v for k, v in line.items() if k != "skipped_iterations"} for line in lines], weights(trainer))
        )
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])

"""check_shape and require_finite."""

import pytest
import torch

from vipo.types import StepRecord, Trajectory, check_shape, require_finite


def test_binds_letters_and_checks_integers():
    sizes = check_shape("frames", torch.zeros(2, 1, 3, 4, 5), "N F 3 Y X")
    assert sizes == {"N": 2, "F": 1, "Y": 4, "X": 5}
    check_shape("maps", torch.zeros(2, 1), "N F", sizes)


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ("N F 3", {}, "wrong number of dimensions"),
        ("N 3", {}, r"with 3 = 3, got \(2, 4\)"),
        ("N M", {"N": 7}, r"with N = 7, got \(2, 4\)"),
    ],
)
def test_names_what_is_wrong(shape, sizes, message):
    with pytest.raises(ValueError, match=f"^x: .*{message}"):
        check_shape("x", torch.zeros(2, 4), shape, sizes)


def test_require_finite_names_the_first_bad_element():
    require_finite("x", torch.zeros(2, 2))
    bad = torch.zeros(2, 2)
    bad[1, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"x is not finite: first bad element at index \[1, 0\]"):
        require_finite("x", bad)


def test_a_trajectory_moves_with_all_it_holds_and_forgets_steps():
    steps = {k: StepRecord(torch.full((2, 1), float(k)), torch.zeros(2, 1), None) for k in range(3)}
    traj = Trajectory(["a", "b"], [1, 2], {"k": 1}, steps, torch.ones(2), [(torch.ones(1), None)], {"x": torch.ones(1)},
                      torch.empty(0), (1, 1, 1, 1))  # fmt: skip
    traj.keep([0, 2])
    assert list(traj.steps) == [0, 2]
    assert traj.steps[2].take(torch.tensor([1])).latents.tolist() == [[2.0]]
    moved = traj.to("meta")
    held = [moved.final, moved.encoded[0][0], moved.prepared["x"], moved.steps[2].next_latents, moved.layout]
    assert {tensor.device.type for tensor in held} == {"meta"}
    assert moved.encoded[0][1] is None and moved.prompts == ["a", "b"] and traj.final.device.type == "cpu"

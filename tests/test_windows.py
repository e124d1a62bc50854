"""vipo.windows: literal windows, and what every mode keeps to."""

import pytest

from vipo.config import Config
from vipo.windows import stochastic_window


def window(mode, iteration, **options):
    return stochastic_window(mode, 3, (1, 7), iteration=iteration, seed=4, **options)


def test_fixed_and_sliding_windows():
    assert window("fixed", 0) == window("fixed", 99) == (1, 2, 3)
    sliding = [window("sliding", i, every=2, stride=1)[0] for i in range(10)]
    assert sliding == [1, 1, 2, 2, 3, 3, 4, 4, 1, 1]  # (4, 5, 6) is the last that fits
    assert window("sliding", 25, stride=2) == (3, 4, 5)


@pytest.mark.parametrize("mode", ["random", "scattered"])
def test_random_choices_are_seeded_and_reach_every_step(mode):
    found = [window(mode, i) for i in range(60)]
    assert found == [window(mode, i) for i in range(60)]
    assert len(set(found)) > 3 and set(sum(found, ())) == {1, 2, 3, 4, 5, 6}
    assert all(len(steps) == 3 and list(steps) == sorted(set(steps)) for steps in found)
    assert (mode == "random") == all(steps[2] - steps[0] == 2 for steps in found)
    other = [stochastic_window(mode, 3, (1, 7), iteration=i, seed=5) for i in range(60)]
    assert other != found


def test_the_config_keeps_windows_within_the_steps():
    def sampling(**settings):
        return Config.from_mapping({"sampling": {"num_inference_steps": 10, **settings}})

    assert sampling().sampling.reach == (0, 9) and sampling().trained_steps == 5
    fast = sampling(window=3, window_mode="scattered", window_range=[0, 6])
    assert fast.sampling.reach == (0, 6) and fast.trained_steps == 2
    assert sampling(window_range=[2, 40]).sampling.reach == (2, 9)
    for settings in ({"window": 10}, {"window": 4, "window_range": [0, 3]}, {"window_range": [9, 12]}):
        with pytest.raises(ValueError, match="sampling.window: .* do not fit into steps"):
            sampling(**settings)
    for reach in ([3, 3], [-1, 3]):
        with pytest.raises(ValueError, match="0 <= first < end"):
            sampling(window_range=reach)

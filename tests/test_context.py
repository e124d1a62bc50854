"""Ranks that share the tokens of a sample (gloo): samples, metrics and weights are those of one process."""

import pytest
from test_distributed import FULL, assert_equal, case, run

from vipo.config import Config
from vipo.distributed import Ranks
from vipo.trainer import Trainer

CLIP = {  # noise of their own: samples that differ by rounding alone would have advantages of rounding
    "sampling": {"call": {"num_frames": 5, "max_sequence_length": 16}, "same_initial_noise": False},
    "prompts": {"per_iteration": 2, "group_size": 2},
}
PICTURE = {"sampling": {"call": {"max_sequence_length": 16}}}
FLUX2 = {"sampling": {"call": {"max_sequence_length": 32, "text_encoder_out_layers": [1, 2, 3]}}}
CONTEXT = {"parallel": {"context": 2, "timeout": 60}}
KL = {"loss": {"kl_beta": 0.1}}
BOTH = {"parallel": {"context": 2, "shard": True, "timeout": 60}}
MORE = {
    "model": {"gradient_checkpointing": True},
    "sampling": {"guidance_scale": 4.0, "unconditional": "frozen", "micro_batch": 2},
    "map": {"control": "ones"},
    "loss": {"kl_beta": 0.1},
    "optimizer": {"step_fraction": 1.0, "updates_per_rollout": 2, "ema": 0.5},
}


def clip(name, world, *changes, **more):
    return case(name, world, CLIP, *changes, family="wan", **more)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cases = [
        clip("more_one", 1, MORE, iterations=1),
        clip("more_two", 2, MORE, CONTEXT, iterations=1),
        clip("full_one", 1, FULL, KL),
        clip("full_saved", 2, FULL, KL, CONTEXT, iterations=1, mode="no"),
        clip("full_resumed", 1, FULL, KL, iterations=2, mode="resume", begun_by="full_saved"),
        clip("nan_loss", 2, CONTEXT, bad=[["advantages", 1, 0]]),
        case("no_plan", 2, CONTEXT),
        clip("few_heads", 4, {"parallel": {"context": 4}}),
        clip("odd_tokens", 2, CONTEXT, {"sampling": {"height": 48, "width": 48, "call": {"num_frames": 1}}}),
        clip("uneven", 4, CONTEXT, {"prompts": {"per_iteration": 1, "group_size": 3}}),
        clip("odd_world", 3, CONTEXT),
    ]
    return run(tmp_path_factory.mktemp("context"), cases)


@pytest.fixture(scope="module")
def more_found(tmp_path_factory):
    cases = [
        clip("one", 1),
        clip("four", 4, CONTEXT),
        clip("full_one", 1, FULL),
        clip("full_sharded", 4, FULL, BOTH),
        case("flux_one", 1, PICTURE, family="flux"),
        case("flux_two", 2, PICTURE, CONTEXT, family="flux"),
        case("flux2_one", 1, FLUX2, family="flux2"),
        case("flux2_two", 2, FLUX2, CONTEXT, family="flux2"),
        clip("hangs", 4, {"parallel": {"context": 2, "timeout": 5}}, iterations=1, hangs=1),
        clip("auto", 2, CONTEXT, {"sampling": {"micro_batch": "auto"}}, iterations=1),
    ]
    return run(tmp_path_factory.mktemp("more"), cases)


def assert_shared(alone, several):
    """Of every group of two the first rank, and the second, have what one process has."""
    for each in (several[::2], several[1::2]):
        assert_equal(alone, each)
    assert all(rank["weights"] == several[0]["weights"] for rank in several)


def test_the_result_does_not_depend_on_who_has_which_tokens(found):
    assert_shared(found["more_one"], found["more_two"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alone", "several"),
    [("one", "four"), ("full_one", "full_sharded"), ("flux_one", "flux_two"), ("flux2_one", "flux2_two")],
)
def test_nor_on_the_number_of_groups_the_family_and_who_has_which_weights(more_found, alone, several):
    assert_shared(more_found[alone], more_found[several])


def test_a_run_goes_on_without_sharing_tokens(found):
    (resumed,), one = found["full_resumed"], found["full_one"][0]
    assert_equal([{**one, "metrics": one["metrics"][1:], "frames": []}], [resumed])
    assert [len(rank["metrics"]) for rank in found["full_saved"]] == [1, 1]


@pytest.mark.slow
def test_auto_tries_a_micro_batch_on_all_ranks(more_found):
    assert [rank["metrics"][0]["micro_batch"] for rank in more_found["auto"]] == [4, 4]


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_no_longer_than_asked(more_found):
    """Its neighbour waits in the group of the two, which is not that of all ranks."""
    assert "parallel.timeout = 5 s" in more_found["hangs"][0]["error"]
    assert "Timed out waiting 5000ms" in more_found["hangs"][0]["error"]


def test_a_loss_that_is_not_finite_ends_all(found):
    other, bad = found["nan_loss"]
    assert "loss of step 0 is not finite" in bad["error"] and "rank 1 has met a tensor" in other["error"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_plan", "SD3Transformer2DModel cannot share its tokens"),
        ("few_heads", "expected a divisor of the 2 attention heads of WanTransformer3DModel, got 4"),
        ("odd_tokens", "9 tokens cannot be shared evenly by 2 ranks"),
        ("uneven", "3 samples cannot be shared evenly by 2 groups of parallel.context=2 ranks"),
        ("odd_world", "expected a divisor of the number of ranks, 3, got 2"),
    ],
)
def test_what_cannot_be_shared_is_refused_on_every_rank(found, name, words):
    assert all(words in rank["error"] and "\n" not in rank["error"] for rank in found[name])


def test_a_group_makes_the_same_samples():
    shares = [Ranks(rank, 4, context=2).share(8) for rank in range(4)]
    assert shares == [slice(0, 4), slice(0, 4), slice(4, 8), slice(4, 8)]


def test_compiled_blocks_were_not_tried():
    with pytest.raises(ValueError, match="parallel.context: was not tried with compiled blocks"):
        Config.from_mapping({"parallel": {"context": 2}, "model": {"compile": True}})


def test_one_process_has_nobody_to_share_with():
    with pytest.raises(ValueError, match="parallel.context: expected a divisor of the number of ranks, 1, got 2"):
        Trainer(Config.from_mapping({"parallel": {"context": 2}}))

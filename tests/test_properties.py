"""Properties that hold for any input: parsers raise ValueError in one line or not at all; maps keep their shapes."""

import base64
import json
import string

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vipo.advantages import group_advantages
from vipo.config import Config, fields
from vipo.maps import MaskFile
from vipo.named import apply_overrides
from vipo.prompts import read_prompts
from vipo.psm import LatentAllocation
from vipo.psm.latent_grid import frame_groups, pool_time, spread_time
from vipo.rewards.wire import Sample, decode_sample, encode_sample

KEYS = [key for key, _, _ in fields()]
fast = settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
texts = (
    st.text(max_size=60)
    | st.text(alphabet=string.printable, max_size=60)
    | st.text('[]{}:",\\-&*!\n \t#ab1', max_size=60)
)


def refused_in_one_line_or(work):
    """Do the work: a ValueError of one line per problem is fine, nothing else is."""
    try:
        return work()
    except ValueError as error:
        lines = str(error).splitlines()
        assert lines and all(line.strip() and len(line) < 2000 for line in lines), str(error)


@fast
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "loss": st.fixed_dictionaries(
                {"clip_range": st.floats(1e-6, 0.99), "level": st.sampled_from(["position", "sample"])}
            ),
            "optimizer": st.fixed_dictionaries({"learning_rate": st.floats(1e-12, 1e3)}),
            "prompts": st.fixed_dictionaries({"path": st.text(min_size=1), "group_size": st.integers(2, 10**9)}),
            "sampling": st.fixed_dictionaries(
                {"call": st.dictionaries(st.text(), st.text() | st.integers() | st.booleans())}
            ),
            "run": st.fixed_dictionaries({"seed": st.integers(0, 2**62), "tensorboard": st.booleans()}),
        },
    )
)
def test_a_config_comes_back_from_its_yaml(tmp_path, mapping):
    config = Config.from_mapping(mapping)
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert Config.from_yaml(tmp_path / "c.yaml") == config


@fast
@given(st.sampled_from(KEYS) | texts, texts | json_values.map(lambda value: yaml.safe_dump(value)))
def test_any_override_is_taken_or_refused_in_one_line(key, value):
    refused_in_one_line_or(lambda: Config.from_mapping(apply_overrides({}, [f"--{key}={value}"])))


@fast
@given(st.binary(max_size=80) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_config_file_is_read_or_refused(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    refused_in_one_line_or(lambda: Config.from_yaml(tmp_path / "c.yaml"))


@fast
@given(
    st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv"]),
    st.binary(max_size=80)
    | texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | texts.map(lambda text: f"prompt,category,uuid\n{text}".encode("utf-8", "surrogatepass"))
    | st.builds(
        lambda more: json.dumps({"prompt": "a", **more}).encode(),
        st.dictionaries(st.text(max_size=8), json_values, max_size=2),
    )
    | st.builds(lambda name: json.dumps({"prompt": "a", "image": name}).encode(), st.text(max_size=300)),
)
def test_any_prompt_file_is_read_or_refused(tmp_path, suffix, content):
    (tmp_path / f"p{suffix}").write_bytes(content)
    found = refused_in_one_line_or(lambda: read_prompts(str(tmp_path / f"p{suffix}")))
    assert found is None or (found and all(prompt.text == prompt.text.strip() for prompt in found))


@fast
@given(st.binary(max_size=60) | st.builds(lambda v: json.dumps({"prompt": "a", "boxes": v}).encode(), json_values))
def test_any_mask_file_is_read_or_refused(tmp_path, content):
    (tmp_path / "m.jsonl").write_bytes(content)
    found = refused_in_one_line_or(lambda: MaskFile(tmp_path / "m.jsonl"))
    if found is not None and found.entries:
        refused_in_one_line_or(lambda: found.check(list(found.entries)))


sizes = st.integers(1, 9)
grouping = st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4, 8]), st.booleans())


def random(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@fast
@given(sizes, sizes, sizes, sizes, grouping, st.sampled_from([0.25, 1.0, 3.0]), st.sampled_from([0.0, 0.5]), sizes)
def test_maps_of_any_shape_are_placed_with_mean_one(h, w, height, width, groups, temperature, floor, seed):
    latent, compression, alone = groups
    count = int(alone) + (latent - int(alone)) * compression
    allocation = LatentAllocation(temperature=temperature, floor=floor)
    values = random(2, count, h, w, seed=seed)
    maps = allocation.place(values, (latent, height, width), compression, first_frame_alone=alone)
    assert maps.shape == (2, latent, height, width) and maps.dtype == torch.float32
    assert bool(torch.isfinite(maps).all()) and float(maps.min()) >= floor - 1e-6
    torch.testing.assert_close(maps.mean((1, 2, 3)), torch.ones(2), rtol=1e-5, atol=1e-5)
    blank = allocation.place(torch.zeros_like(values), (latent, height, width), compression, first_frame_alone=alone)
    assert torch.equal(blank, torch.ones_like(blank))  # nothing said is scalar GRPO


@fast
@given(grouping, sizes, sizes, sizes)
def test_pooling_over_time_undoes_spreading_and_keeps_sums(groups, height, width, seed):
    latent, compression, alone = groups
    maps = random(1, latent, height, width, seed=seed)
    spread = spread_time(maps, compression, first_frame_alone=alone)
    pooled = pool_time(spread, latent, compression, first_frame_alone=alone)
    torch.testing.assert_close(pooled, maps, rtol=1e-6, atol=0)
    counts = torch.full((latent, 1, 1), float(compression))
    counts[0] = 1 if alone else compression
    torch.testing.assert_close(spread.double().sum(), (maps[0].double() * counts).sum(), rtol=1e-9, atol=0)
    if compression > 1 and latent > 1:
        assert frame_groups(spread.shape[1], latent) == (compression, alone)


@fast
@given(
    st.integers(1, 4), st.integers(2, 6), st.integers(-100, 100), st.sampled_from([0.5, 2.0, 16.0]), st.integers(0, 99)
)
def test_advantages_know_no_shift_no_scale_and_no_order(groups, size, shift, scale, seed):
    apart = torch.randperm(groups * size, generator=torch.Generator().manual_seed(seed))
    rewards = apart + 0.1 * random(groups * size, seed=seed)
    plain = group_advantages(rewards, size, eps=0)
    assert plain.shape == (groups * size,)
    torch.testing.assert_close(group_advantages(rewards + shift, size, eps=0), plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(group_advantages(rewards * scale, size, eps=0), plain, rtol=1e-5, atol=1e-5)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    moved = group_advantages(rewards.view(groups, size)[:, order].flatten(), size, eps=0)
    torch.testing.assert_close(moved, plain.view(groups, size)[:, order].flatten(), rtol=1e-5, atol=1e-5)
    assert float(plain.view(groups, size).sum(1).abs().max()) < 1e-4


@settings(fast, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.text(max_size=20), st.integers(0, 99))
def test_samples_come_back_from_the_wire(frames, height, width, prompt, seed):
    clip = (random(frames, 3, height, width, seed=seed) * 255).round() / 255
    sent = json.dumps(encode_sample(clip, prompt, "png", 8.0))
    sample = Sample.model_validate_json(sent)
    assert sample.prompt == prompt
    torch.testing.assert_close(decode_sample(sample, 10**6), clip, rtol=0, atol=1e-6)


@fast
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_on_the_wire_are_refused(content, moving):
    text = base64.b64encode(content).decode()
    sample = Sample(prompt="a", video=text) if moving else Sample(prompt="a", frames=[text])
    with pytest.raises(ValueError) as caught:
        decode_sample(sample, 10**6)
    assert len(str(caught.value).splitlines()) == 1

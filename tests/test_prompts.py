"""Prompt files and groups."""

import pytest

from vipo.prompts import prompt_batch, read_prompts


def test_reads_lines_and_skips_blanks(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  ein Hünd \n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.txt")) == ["a cat", "ein Hünd"]


def test_embedded_prompts_are_disjoint_from_the_held_out_ones():
    from vipo.nano import ASSETS

    train, held_out = read_prompts("nano"), read_prompts(str(ASSETS / "prompts_held_out.txt"))
    assert len(train) == 768 and len(held_out) == 256
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "is empty"), (b" \n\n", "is empty"), (b"a \xff cat", "is not UTF-8")],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts.path: .*{message}"):
        read_prompts(str(path))


def test_groups_are_adjacent_seeded_and_differ_by_iteration():
    prompts = [f"p{i}" for i in range(10)]
    options = {"per_iteration": 3, "group_size": 4, "seed": 5}
    batch = prompt_batch(prompts, 2, **options)
    assert batch == prompt_batch(prompts, 2, **options)
    assert [batch.prompts[i] for i in (0, 4, 8)] == [prompts[batch.indices[i]] for i in (0, 4, 8)]
    assert all(len(set(batch.prompts[i : i + 4])) == 1 for i in (0, 4, 8))
    assert len(set(batch.seeds)) == 12
    assert [len(set(batch.initial_seeds[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    apart = prompt_batch(prompts, 2, **options, same_initial_noise=False)
    assert apart.initial_seeds == apart.seeds
    assert prompt_batch(prompts, 3, **options).seeds != batch.seeds
    assert prompt_batch(prompts, 2, **{**options, "seed": 6}).seeds != batch.seeds


def test_an_epoch_uses_every_prompt_once():
    prompts = [f"p{i}" for i in range(6)]
    seen = [prompt_batch(prompts, i, per_iteration=2, group_size=2, seed=0).prompts[::2] for i in range(3)]
    assert sorted(sum(seen, [])) == prompts

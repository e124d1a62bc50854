"""Published prompt sets, as their authors publish them, and the two of our own."""

import json

import pytest

from vipo.prompt_sets import READERS, read_prompt_set
from vipo.prompts import EMBEDDED, read_prompts
from vipo.types import Prompt

GENEVAL = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}
FILES = {
    "hpdv2": ("anime.json", json.dumps(["a fox ", "a dog"]), [("a fox", "anime"), ("a dog", "anime")]),
    "vbench": (
        "VBench_full_info.json",
        json.dumps(
            [
                {"prompt_en": "a bird and a cat", "dimension": ["multiple_objects", "style"], "auxiliary_info": {}},
                {"prompt_en": "Garden, zoom in.", "dimension": "Camera_Motion"},
            ]
        ),
        [("a bird and a cat", "multiple_objects, style"), ("Garden, zoom in.", "Camera_Motion")],
    ),
    "geneval": (
        "evaluation_metadata.jsonl",
        json.dumps(GENEVAL) + "\n\n" + json.dumps({**GENEVAL, "prompt": "b"}) + "\n",
        [("a photo of two cats", "counting"), ("b", "counting")],
    ),
    "partiprompts": (
        "PartiPrompts.tsv",
        'Prompt\tCategory\tChallenge\tNote\r\nThe words "Fly, high" on a wall\tArtifacts\tComplex\t\r\n'
        '"quoted" start\tArts\tBasic\tnote\r\n',
        [('The words "Fly, high" on a wall', "Artifacts"), ('"quoted" start', "Arts")],
    ),
    "drawbench": (
        "drawbench.csv",
        'Prompts,Category\nA red colored car.,Colors\n"A sign that says ""Hi"", twice",Text\n',
        [("A red colored car.", "Colors"), ('A sign that says "Hi", twice', "Text")],
    ),
    "vidprom": (
        "VidProM_unique.csv",
        'uuid,prompt,time,toxicity\n1-a,"waves,\nslowly",2023,0.1\n2-b,a train,2023,0.2\n',
        [("waves,\nslowly", ""), ("a train", "")],
    ),
    "t2icompbench": (
        "color_val.txt",
        "a green bench and a red car\nThe soft, warm glow of a candle.\ta candle\na cat,\n\n",
        [("a green bench and a red car", ""), ("The soft, warm glow of a candle.", ""), ("a cat", "")],
    ),
}


def write(folder, kind):
    name, content, expected = FILES[kind]
    (folder / name).write_bytes(content.encode())
    return folder / name, [Prompt(text, category=category) for text, category in expected]


@pytest.mark.parametrize("kind", READERS)
def test_every_set_is_told_by_its_content_and_read(tmp_path, kind):
    path, expected = write(tmp_path, kind)
    assert read_prompt_set(path) == expected == read_prompt_set(path, kind)
    if kind != "t2icompbench":  # a plain list of lines keeps its commas
        assert read_prompts(str(path)) == expected


def test_drawbench_may_come_with_tabs_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "drawbench.tsv"
    path.write_text('\ufeffPrompts\tCategory\nA sign saying "Hi"\tText\n', encoding="utf-8")
    assert read_prompt_set(path) == [Prompt('A sign saying "Hi"', category="Text")]


def test_metadata_of_geneval_is_no_keyword_of_the_call(tmp_path):
    path, _ = write(tmp_path, "geneval")
    assert all(prompt.call == {} and prompt.key == "{}" for prompt in read_prompts(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.json", '{"a": 1}', None, "none of the prompt sets known: hpdv2, vbench"),
        ("a.json", "[", None, "a.json is not JSON"),
        ("a.json", '["a", 1]', None, "expected a JSON list of texts"),
        ("a.json", '[{"prompt": "a"}]', None, 'entry 1: expected {"prompt_en"'),
        ("a.csv", "name,text\na,b\n", None, "none of the prompt sets known"),
        ("a.csv", "Prompts,Category\na,b\n", "vidprom", "vidprom has the columns uuid, prompt, got prompts, category"),
        ("a.csv", "uuid,prompt\na\n", None, "line 2: has no column prompt"),
        ("a.tsv", "Prompt\tCategory\tChallenge\n", None, "is empty"),
        ("a.txt", "a cat", "partyprompts", "did you mean 'partiprompts'"),
        ("a.jsonl", '{"tag": "a", "include": []}', None, 'line 1: expected {"prompt"'),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, content, kind, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="(?s)^[^\n]*$") as caught:
        read_prompt_set(tmp_path / name, kind)
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "count"), [("general", 64), ("motion", 48)])
def test_our_own_sets_are_distinct_and_apart_from_training(name, count):
    texts = [prompt.text for prompt in read_prompts(name)]
    assert len(texts) == len(set(texts)) == count
    others = {prompt.text for other in EMBEDDED if other != name for prompt in read_prompts(other)}
    assert not others & set(texts)

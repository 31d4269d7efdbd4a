"""Documents that teach to find the pass key: their length, what can be found in them, every mistake in one line."""

import json
import re

import pytest

from megayoco.data.command import run_command
from tests.tools.test_make_retrieval import load_tool

make_passkey = load_tool("make_passkey")


def made(output, *more):
    arguments = ["--output", str(output), "--documents", "60", *map(str, more)]
    assert run_command(make_passkey.main, arguments) == 0
    return [json.loads(line)["text"] for line in output.read_text().splitlines()]


@pytest.mark.parametrize("characters", [128, 257, 512])
def test_documents_state_one_key_before_they_ask_for_it(tmp_path, characters):
    texts = made(tmp_path / "new" / "passkey.jsonl", "--characters", characters, "--longest-filler", 200)
    assert {len(text) for text in texts} == {characters} and len(set(texts)) > 40
    for text in texts:
        stated = [match.start() for match in re.finditer(r"The pass key is (\d+)\. Remember it\. \1 is", text)]
        asked = [match.start() for match in re.finditer(r"What is the pass key\? The pass key is (\d+)\.\n", text)]
        assert stated and asked and stated[0] < asked[0] and text.endswith(".\n")
        assert len(set(re.findall(r"key is (\d+)", text))) == 1
    assert len({len(re.search(r"key is (\d+)", text)[1]) for text in texts}) == 5
    assert made(tmp_path / "again.jsonl", "--characters", characters, "--longest-filler", 200) == texts


def test_filler_alone_has_no_key(tmp_path):
    texts = made(tmp_path / "filler.jsonl", "--characters", 300, "--without-key")
    assert {len(text) for text in texts} == {300} and len(set(texts)) > 20
    assert all("The grass" in text and "key" not in text for text in texts)


def test_mistakes_are_told_and_nothing_is_lost(tmp_path, capsys):
    output = tmp_path / "passkey.jsonl"
    texts = made(output, "--characters", 200)
    arguments = ["--output", str(output), "--documents", "60", "--characters"]
    for more, message in (
        (["200"], "exists. Choose another"),
        (["100", "--overwrite"], "--characters 100 has no room"),
    ):
        assert run_command(make_passkey.main, [*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == texts
    assert made(output, "--characters", 200, "--seed", 2, "--overwrite") != texts
    assert [path.name for path in tmp_path.iterdir()] == [output.name]

"""The prompts of the retrieval evaluations: their text, their length, where the needles stand."""

import itertools
import random
import re

import pytest

from megayoco.config.evaluation import MultiNeedleOptions, NeedleOptions, PasskeyOptions
from megayoco.data.tokenizer import ByteTokenizer, TiktokenTokenizer, write_rank_file
from megayoco.data.tokenizer.ranks import CL100K_PATTERN
from megayoco.errors import UserError
from megayoco.evaluate.cases import SLACK
from megayoco.evaluate.haystack import Haystack
from megayoco.evaluate.multi_needle import multi_needle_task, needle_places
from megayoco.evaluate.needle import CITIES, needle_task
from megayoco.evaluate.passkey import FILLER, official_numbers, passkey_task, passkey_text

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer whose tokens are bytes and some words with the space before them."""
    path = tmp_path_factory.mktemp("ranks") / "ranks.tiktoken"
    merged = [b" t", b" th", b" the", b"in", b" in", b"is", b" is", b"ma", b"mag", b"er", b"  "]
    ranks = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(merged)}
    write_rank_file(path, ranks, CL100K_PATTERN, {"<|endoftext|>": 256 + len(merged)})
    return TiktokenTokenizer(str(path))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A haystack of numbered words."""
    path = tmp_path_factory.mktemp("text") / "haystack.txt"
    path.write_text("".join(f"line {i} is in the text\n" for i in range(5000)), encoding="utf-8")
    return str(path)


def prompts_of(task):
    return [prompt for group in task.groups for prompt in task.build(group)]


def test_the_prompt_of_one_needle_is_the_official_one(text):
    options = NeedleOptions(lengths=[600], depths=[0.5], trials=1, haystack=text, start_token="none")
    [prompt] = prompts_of(needle_task(BYTES, options, None))
    written = BYTES.decode(prompt.tokens)
    match = re.fullmatch(
        r"There is a special magic number inside a lot of irrelevant text\. Find it and memorize them\. I will quiz you"
        r" about the magic number there\. (line .+) \nThe special magic (.+) number is (\d+) \. \n(.+) \nWhat is the"
        r" special magic (.+) number\? The special magic (.+) number is  ",
        written,
    )
    assert match, written
    before, city, number, after, *asked = match.groups()
    assert asked == [city, city] and city in CITIES
    assert number == prompt.answer and 1 <= int(number) <= 50_000
    # one running text around the needle
    running = f"{before} {after}".split()
    numbers = [int(word) for word in running if word.isdigit()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_there_are_69_cities_each_once():
    assert len(set(CITIES)) == len(CITIES) == 69
    assert {"Almaty", "Ho Chi Minh City", "Buenos Aires", "Sydney", "Yerevan"} <= set(CITIES)
    assert all(city == city.strip() and "\n" not in city for city in CITIES)


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_prompts_have_the_length_that_they_are_labelled_with(tokenizer, words, text):
    tokenizer = BYTES if tokenizer == "bytes" else words
    tasks = [
        needle_task(tokenizer, NeedleOptions(lengths=[500, 1333], trials=2, haystack=text, max_new_tokens=7), None),
        multi_needle_task(tokenizer, MultiNeedleOptions(lengths=[1500], needles=[1, 8], trials=1, haystack=text), None),
        passkey_task(tokenizer, PasskeyOptions(lengths=[500, 1333], trials=5), None),
    ]
    answers = (7, 20, 20)
    for task, answer in zip(tasks, answers, strict=True):
        for prompt in prompts_of(task):
            spare = prompt.case.length - answer - len(prompt.tokens)
            # a word of the text, or a character of the filler, more would not fit
            assert 0 <= spare <= SLACK + 8, (prompt.case, spare)
            assert prompt.tokens[0] == tokenizer.eod


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_needle_stands_at_its_depth(depth, text):
    options = NeedleOptions(lengths=[4000], depths=[depth], trials=1, haystack=text)
    [prompt] = prompts_of(needle_task(BYTES, options, None))
    written = BYTES.decode(prompt.tokens)
    begin = written.index("there. ") + len("there. ")
    needle = written.index("\nThe special magic")
    end = written.index("\nWhat is the special")
    filler = end - begin - (written.index(" . \n", needle) + 3 - needle)
    assert (needle - begin) / filler == pytest.approx(depth, abs=0.005)


def test_prompts_follow_from_their_case_alone(text):
    options = NeedleOptions(lengths=[500, 700], depths=[0.0, 0.5], trials=2, haystack=text)
    every = {prompt.case: prompt for prompt in prompts_of(needle_task(BYTES, options, None))}
    alone = needle_task(BYTES, NeedleOptions(lengths=[700], depths=[0.5], trials=2, haystack=text), None)
    for prompt in prompts_of(alone):
        assert prompt == every[prompt.case]
    assert len({prompt.answer for prompt in every.values()}) == 8
    other = needle_task(BYTES, NeedleOptions(lengths=[700], trials=2, haystack=text, seed=1), None)
    assert not {p.answer for p in prompts_of(other)} & {p.answer for p in every.values()}


def test_spaces_at_the_end_and_the_start_token_are_options(text):
    def tokens(**more):
        options = NeedleOptions(lengths=[500], depths=[0.5], trials=1, haystack=text, **more)
        return prompts_of(needle_task(BYTES, options, None))[0].tokens

    assert BYTES.decode(tokens()).endswith("number is  ")
    assert BYTES.decode(tokens(strip_prompt=True)).endswith("number is")
    assert tokens()[0] == tokens(start_token="eod")[0] == 256
    assert tokens(start_token="none")[0] == ord("T")
    with pytest.raises(UserError, match="--start-token bos: the tokenizer has no such token"):
        tokens(start_token="bos")


def test_multi_needle_hides_as_many_as_it_says_with_cities_of_their_own(text):
    options = MultiNeedleOptions(lengths=[4000], needles=[1, 2, 8], trials=2, haystack=text)
    for prompt in prompts_of(multi_needle_task(BYTES, options, None)):
        written = BYTES.decode(prompt.tokens)
        found = re.findall(r"\nThe special magic (.+) number is: (\d+)\n", written)
        assert len({city for city, _ in found}) == len(found) == prompt.case.needles
        asked = re.search(r"What is the special magic (.+) number\?", written)[1]
        assert dict(found)[asked] == prompt.answer
        # the one asked for is at the depth: so much of the text is before it
        place = written.index(f"magic {asked} number is:")
        assert place / len(written) == pytest.approx(prompt.case.depth, abs=0.12)
        assert prompt.depth == prompt.case.depth


def test_places_of_needles_around_the_one_that_is_asked_for():
    counts = set()
    for seed in range(200):
        places, asked = needle_places(random.Random(seed), 4, 0.6)
        assert places == sorted(places) and places[asked] == 0.6 and len(places) == 4
        assert min(places) >= 0 and max(places) <= 1
        counts.add(asked + 1)
    assert counts == {1, 2, 3}  # k in 1 .. N - 1
    assert needle_places(random.Random(0), 1, 0.25) == ([0.25], 0)


def test_every_needle_can_be_asked_for(text):
    options = MultiNeedleOptions(lengths=[3000], needles=[4], depths=[0.5], trials=1, query="all", haystack=text)
    prompts = prompts_of(multi_needle_task(BYTES, options, None))
    assert len(prompts) == 4
    written = [BYTES.decode(prompt.tokens) for prompt in prompts]
    found = dict(re.findall(r"\nThe special magic (.+) number is: (\d+)\n", written[0]))
    asked = [re.search(r"What is the special magic (.+) number\?", one)[1] for one in written]
    assert set(asked) == set(found)
    assert [found[city] for city in asked] == [prompt.answer for prompt in prompts]
    assert all(a.depth < b.depth for a, b in itertools.pairwise(prompts))


@pytest.mark.parametrize(("seed", "key"), [(0, 43568), (1, 33004), (555, 15338)])
def test_passkeys_by_characters_are_those_of_the_script(seed, key):
    before, number = official_numbers(30_000, seed)
    assert number == key and 0 <= before < 30_000
    [prompt] = prompts_of(passkey_task(BYTES, PasskeyOptions(characters=[30_000], trials=1, seed=seed), None))
    written = BYTES.decode(prompt.tokens)
    lines = written.split("\n")
    assert len(lines) == 5
    assert lines[0].endswith("I will quiz you about the important information there.")
    assert lines[2] == f"The pass key is {key}. Remember it. {key} is the pass key."
    assert lines[4] == "What is the pass key? The pass key is"
    assert (len(lines[1]), len(lines[1]) + len(lines[3])) == (before, 30_000)
    assert lines[1].startswith(f"{FILLER} {FILLER} The grass") and lines[3].startswith(f"{FILLER} ")
    assert prompt.drawn and prompt.depth == before / 30_000


def test_passkeys_have_no_greatest_length_and_an_empty_filler_is_one():
    text = passkey_text(300_000, 700_000, 7)
    assert len(text) == 1_000_000 + len(passkey_text(0, 0, 7))
    assert "\n\nThe pass key is 7. Remember" in passkey_text(0, 10, 7)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (needle_task, NeedleOptions(lengths=[200]), r"length 200: the answer leaves 180 tokens .* at least \d+"),
        (multi_needle_task, MultiNeedleOptions(lengths=[600], needles=[1, 8]), "length 600: "),
        (passkey_task, PasskeyOptions(lengths=[5000, 250]), "length 250: "),
        (needle_task, NeedleOptions(), "nothing tells the length .* Give --lengths"),
        (needle_task, NeedleOptions(lengths=[900], haystack="/nowhere/x"), "--haystack /nowhere/x: no such file"),
    ],
    ids=["needle", "multi", "passkey", "unknown", "haystack"],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(task, options, message):
    with pytest.raises(UserError, match=message):
        task(BYTES, options, None)


def test_lengths_by_interval_and_by_what_the_model_was_trained_for(text):
    options = NeedleOptions(interval=500, max_length=1700, trials=1, haystack=text)
    assert sorted({group[0].length for group in needle_task(BYTES, options, 9).groups}) == [500, 1000, 1500]
    task = needle_task(BYTES, NeedleOptions(trials=1, haystack=text), 800)
    assert {group[0].length for group in task.groups} == {800}


def test_a_short_haystack_is_read_again_and_says_so(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("one two three four five six seven\neight nine\n\n", encoding="utf-8")
    options = NeedleOptions(lengths=[400, 1000], depths=[0.5], trials=1, haystack=str(path))
    for prompt in prompts_of(needle_task(BYTES, options, None)):
        assert prompt.repeats
        assert prompt.case.length - 20 - len(prompt.tokens) <= SLACK + 8
    path.write_text("".join(f"word{i}\n" for i in range(1000)), encoding="utf-8")
    assert not any(prompt.repeats for prompt in prompts_of(needle_task(BYTES, options, None)))


def test_a_haystack_without_spaces_is_cut_too(tmp_path):
    path = tmp_path / "cjk.txt"
    path.write_text("天地玄黄宇宙洪荒" * 500, encoding="utf-8")
    options = NeedleOptions(lengths=[2000], depths=[0.5], trials=1, haystack=str(path))
    [prompt] = prompts_of(needle_task(BYTES, options, None))
    assert 0 <= 2000 - 20 - len(prompt.tokens) <= 16 * 3


def test_a_haystack_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no text"):
        Haystack.open(str(tmp_path / "empty.txt"))


def test_the_own_haystack_is_text_of_the_standard_library_the_same_in_every_process(monkeypatch):
    haystack = Haystack.open(None)
    assert haystack.identity["haystack"] == "the Python standard library"
    # whatever this process has made of its built-in modules
    monkeypatch.setattr("builtins.abs", lambda x: x)
    assert haystack.identity == Haystack.open(None).identity
    filler = haystack.filler(BYTES, random.Random(1), 3000)
    assert 2900 < len(filler.part(0, 3000)) <= 3001 and filler.part(0, 3000) == filler.part(0, 3000)

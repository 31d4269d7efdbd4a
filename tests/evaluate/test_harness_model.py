"""What lm-eval is told about texts is what one plain pass of the model over each text says."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from megayoco.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.errors import UserError
from megayoco.evaluate.harness_model import HarnessModel
from megayoco.model.inference import InferenceModel
from megayoco.model.window_options import WindowOptions
from tests.generate.models import build

TOKENIZER = ByteTokenizer()
CONTEXTS = ["", "  ", "The capital of France is", "a context that is long enough for the sums to differ a lot", "x "]
CONTINUATIONS = [" Paris", "b", " Berlin, or else Madrid"]
PAIRS = list(itertools.product(CONTEXTS, CONTINUATIONS))


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


@pytest.fixture(scope="module", params=["retention", "llama"])
def model(request):
    return InferenceModel.of(build(request.param, torch.float64))


@pytest.fixture(scope="module")
def yoco():
    return InferenceModel.of(build("retention", torch.float64))


def plain_scores(model, context, continuation):
    """Sum of log p, and whether all tokens are greedy, from the logits of all rows."""
    tokens = [*context, *continuation]
    logits, _ = model.advance(torch.tensor([tokens[:-1]]), model.empty_context(1), last_only=False)
    rows = logits[0, len(context) - 1 :]
    targets = torch.tensor(continuation)
    log_p = rows.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(log_p), bool((rows.argmax(-1) == targets).all())


def plain_text(model, tokens, count):
    """Greedy continuation, one token after another."""
    new: list[int] = []
    while len(new) < count:
        logits, _ = model.advance(torch.tensor([[*tokens, *new]]), model.empty_context(1))
        token = int(logits[0, -1, : TOKENIZER.vocab_size].argmax())
        if token == TOKENIZER.eod:
            break
        new.append(token)
    return TOKENIZER.decode(new)


def split(context, continuation):
    """As lm-eval does: spaces at the end of a context belong to the continuation."""
    kept = context.rstrip()
    return TOKENIZER.encode(kept), TOKENIZER.encode(context[len(kept) :] + continuation)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 2048), (4, 2048), (4, 5), (32, 30)])
def test_likelihoods_are_those_of_the_full_logits(model, batch_size, chunk):
    lm = HarnessModel(model, TOKENIZER, batch_size=batch_size, prefill_chunk=chunk)
    for pair, got in zip(PAIRS, lm.loglikelihood(requests("loglikelihood", *PAIRS)), strict=True):
        context, continuation = split(*pair)
        expected = plain_scores(model, [TOKENIZER.eod, *context], continuation)
        assert got == (pytest.approx(expected[0], abs=1e-4), expected[1]), pair


def test_greedy_continuations_are_told(yoco):
    best: list[int] = []
    for _ in range(3):
        logits, _ = yoco.advance(torch.tensor([[97, 98, *best]]), yoco.empty_context(1))
        best.append(int(logits.argmax()))
    lm = HarnessModel(yoco, TOKENIZER)
    found = lm._loglikelihood_tokens([(("", ""), [97, 98], best), (("", ""), [97, 98], [*best[:2], best[2] ^ 1])])
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize(("start", "before"), [("auto", [256]), ("eod", [256]), ("none", [])])
def test_contexts_begin_as_asked(yoco, start, before):
    lm = HarnessModel(yoco, TOKENIZER, start_token=start)
    pairs = [("ab", " c"), ("", "c")]
    got = lm.loglikelihood(requests("loglikelihood", *pairs))
    assert got[0][0] == pytest.approx(plain_scores(yoco, [*before, 97, 98], [32, 99])[0], abs=1e-4)
    # nothing comes from nothing: an empty context is always a token
    assert got[1][0] == pytest.approx(plain_scores(yoco, [256], [99])[0], abs=1e-4)


def test_the_context_of_several_long_answers_is_read_once(yoco, monkeypatch):
    read = []
    absorb = InferenceModel.absorb
    monkeypatch.setattr(InferenceModel, "absorb", lambda *args: read.append(args[1].shape[1]) or absorb(*args))
    lm = HarnessModel(yoco, TOKENIZER, batch_size=8, prefill_chunk=16)
    lm.loglikelihood(requests("loglikelihood", *(("y" * 100, answer) for answer in (" a", " b", " c", " d"))))
    assert sum(read) == 100


def test_windows_that_depend_on_the_request_share_no_context():
    model = InferenceModel.of(build("longllama", torch.float64), windows=WindowOptions(last_context=3))
    lm = HarnessModel(model, TOKENIZER, prefill_chunk=16, start_token="none")
    pairs = [("y" * 40, " a"), ("y" * 40, " bcd")]
    for (before, after), (log_p, _) in zip(pairs, lm.loglikelihood(requests("loglikelihood", *pairs)), strict=True):
        expected = plain_scores(model, TOKENIZER.encode(before), TOKENIZER.encode(after))[0]
        assert log_p == pytest.approx(expected, abs=1e-4)


def test_a_continuation_without_token_is_refused(yoco):
    lm = HarnessModel(yoco, TOKENIZER)
    with pytest.raises(UserError, match="no token of its own"):
        lm.loglikelihood(requests("loglikelihood", ("abc", "")))


def test_likelihoods_beyond_the_maximum_lose_their_beginnings_and_are_counted(yoco):
    lm = HarnessModel(yoco, TOKENIZER, max_length=20, start_token="none")
    pairs = [("a" * 30, " bcd"), ("a" * 10, " bcd")]
    got = lm.loglikelihood(requests("loglikelihood", *pairs))
    # the last token is never read: 17 of the context and 3 of the answer are 20
    assert got[0][0] == pytest.approx(plain_scores(yoco, [97] * 17, TOKENIZER.encode(" bcd"))[0], abs=1e-4)
    assert got[1][0] == pytest.approx(plain_scores(yoco, [97] * 10, TOKENIZER.encode(" bcd"))[0], abs=1e-4)
    assert vars(lm.truncation) == {"requests": 1, "tokens": 13, "longest": 33}
    assert (lm.requests, lm.longest) == (2, 20)
    with pytest.raises(UserError, match=r"continuation of 21 tokens does not fit into max_length 20\."):
        lm.loglikelihood(requests("loglikelihood", ("abc", "d" * 21)))


@pytest.mark.parametrize(("max_length", "chunk"), [(None, 2048), (None, 7), (25, 2048), (26, 9)])
def test_rolling_likelihoods_predict_every_token_once(model, max_length, chunk):
    texts = ["The harbour lies on the north side of the island. Fishing boats leave.", "short", ""]
    lm = HarnessModel(model, TOKENIZER, max_length=max_length, prefill_chunk=chunk, batch_size=2)
    got = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    for text, value in zip(texts, got, strict=True):
        tokens = TOKENIZER.encode(text)
        longest = max_length or len(tokens) or 1
        expected = 0.0
        for start in range(0, len(tokens), longest):
            end = min(start + longest, len(tokens))
            # as much context as fits, and the end of a document before the first token
            before = ([TOKENIZER.eod, *tokens])[: start + 1][-(longest - (end - start) + 1) :]
            expected += plain_scores(model, before, tokens[start:end])[0]
        assert value == pytest.approx(expected, abs=1e-3), text
    assert lm.truncation.requests == 0


PROMPTS = ["The capital of France is", "7 + 5 =", "", "one two three four five six seven eight nine ten"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_greedy_up_to_the_first_stop_string(model, batch_size):
    lm = HarnessModel(model, TOKENIZER, batch_size=batch_size)
    whole = [plain_text(model, [256, *TOKENIZER.encode(prompt)], 12) for prompt in PROMPTS]
    asked = {"until": [], "max_gen_toks": 12, "do_sample": False}
    got = lm.generate_until(requests("generate_until", *((prompt, asked) for prompt in PROMPTS)))
    assert got == whole
    # a stop string of each text, two characters long where the text allows it
    stops = [text[3:5] or "\n" for text in whole]
    got = lm.generate_until(
        requests("generate_until", *((p, {**asked, "until": ["\0\0", s]}) for p, s in zip(PROMPTS, stops, strict=True)))
    )
    assert got == [text.partition(stop)[0] for text, stop in zip(whole, stops, strict=True)]
    assert any(0 < len(short) < len(long) for short, long in zip(got, whole, strict=True))


def test_prompts_beyond_the_maximum_lose_their_beginnings_and_are_counted(yoco):
    lm = HarnessModel(yoco, TOKENIZER, max_length=20)
    asked = {"until": [], "max_gen_toks": 6}
    (got,) = lm.generate_until(requests("generate_until", ("0123456789abcdefgh", asked)))
    assert got == plain_text(yoco, TOKENIZER.encode("456789abcdefgh"), 6)
    assert vars(lm.truncation) == {"requests": 1, "tokens": 5, "longest": 25}
    with pytest.raises(UserError, match="max_length 20 has no room for 20 new tokens"):
        lm.generate_until(requests("generate_until", ("abc", {"until": [], "max_gen_toks": 20})))


def test_drawn_texts_repeat_and_differ_from_each_other(yoco):
    asked = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0, "top_p": 0.95, "top_k": -1}
    twelve = requests("generate_until", *[("abc", asked)] * 12)
    first, again = (HarnessModel(yoco, TOKENIZER, batch_size=4).generate_until(twelve) for _ in range(2))
    assert first == again
    assert len(set(first)) > 10  # copies of one request are other draws, also in other batches


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 4}, "num_beams 4: beams are not supported"),
        ({"typical_p": 0.5}, "argument 'typical_p' of a task"),
    ],
)
def test_generation_arguments_that_would_be_ignored_are_refused(yoco, asked, message):
    lm = HarnessModel(yoco, TOKENIZER)
    with pytest.raises(UserError, match=message):
        lm.generate_until(requests("generate_until", ("abc", {"until": [], **asked})))


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    """Bytes, and a token for each speaker."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_for_transformers(ByteTokenizer(), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for number, name in ((257, "<|user|>"), (258, "<|assistant|>")):
        content["added_tokens"].append(
            {"id": number, "content": name, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
        )
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return HuggingFaceTokenizer(str(folder))


def test_a_chat_template_writes_its_special_tokens(yoco, chat_tokenizer):
    lm = HarnessModel(yoco, chat_tokenizer, chat_template=TEMPLATE)
    turns = [{"role": "user", "content": "a"}]
    assert lm.apply_chat_template(turns) == "<|user|>a<|assistant|>"
    begun = [*turns, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "<|user|>a<|assistant|>It is"
    assert lm.chat_template(True) == TEMPLATE
    assert lm.chat_template(False) is None
    assert lm.tok_encode("<|user|>a") == [257, 97]
    assert lm._generating(0, "<|user|>a", {"until": []}).tokens == [257, 97]
    # a prompt that is no conversation may talk about the names
    assert len(HarnessModel(yoco, chat_tokenizer).tok_encode("<|user|>a")) == 9


def test_lm_eval_knows_the_class_by_name():
    assert get_model("megayoco") is HarnessModel

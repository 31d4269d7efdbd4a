"""A conversation reads each token once, and what the cache holds is the conversation."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from megayoco.data.tokenizer import ByteTokenizer, TiktokenTokenizer, build_tokenizer, write_rank_file
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.errors import UserError
from megayoco.generate.chat import Conversation, converse
from megayoco.generate.chat_format import FORMATS, ChatFormat, choose_format, template_format
from megayoco.generate.generation import prefill
from megayoco.generate.sampling import GREEDY, Sampling
from megayoco.model.inference import InferenceModel
from tests.generate.models import inference

EOD = 256
PLAIN, LONGLLAMA = FORMATS["plain"], FORMATS["longllama"]


class Words(ByteTokenizer):
    """Bytes, and above 256 these words, which only a model writes."""

    words = (": I", "€!", "l\nUs", "##", "a#", "\u20ac#".encode()[1:])

    def decode_bytes(self, ids):
        parts = []
        for i in ids:
            word = self.words[i - 257] if i > EOD else None
            parts.append(
                super().decode_bytes([i]) if word is None else word if isinstance(word, bytes) else word.encode()
            )
        return b"".join(parts)

    @property
    def vocab_size(self):
        return 257 + len(self.words)


def written(*parts):
    """Token ids of texts and of words by their number in `Words`."""
    return [i for part in parts for i in (part.encode() if isinstance(part, str) else [part])]


class Scripted(InferenceModel):
    """A real model and its cache, whose answers are given; KeyboardInterrupt in an answer is raised there."""

    def __init__(self, *answers):
        model = inference("retention")
        super().__init__(model.stage, model.config)
        self.answers = [list(answer) for answer in answers]
        self.read = []

    def absorb(self, tokens, context):
        self.read += tokens[0].tolist()
        return super().absorb(tokens, context)

    def advance(self, tokens, context, *, last_only=True):
        answer = self.answers[0]
        token = answer.pop(0)
        if not answer:
            self.answers.pop(0)
        if token is KeyboardInterrupt:
            raise KeyboardInterrupt
        logits, context = super().advance(tokens, context, last_only=last_only)
        self.read += tokens[0].tolist()
        return torch.nn.functional.one_hot(torch.tensor([[token]]), logits.shape[-1]).to(logits.dtype), context


def talk(answers, turns, chat_format=PLAIN, limit=100, tokenizer=None, **options):
    """The conversation after these turns, what was shown of each answer, and the model."""
    model = Scripted(*answers)
    conversation = Conversation(model, tokenizer or Words(), chat_format, GREEDY, limit, prefill_chunk=7, **options)
    shown = []
    for turn in turns:
        parts = []
        conversation.ask(turn, parts.append)
        shown.append("".join(parts))
    return conversation, shown, model


def is_read(conversation, model, text):
    """The conversation is `text`; its cache is that of its tokens, and gives what reading it again gives."""
    memory = conversation._memory
    assert Words().decode([*memory.read, *memory.unread]) + memory.rest == text
    assert memory.context.length == len(memory.read) == len(conversation.tokens)
    fresh = prefill(inference("retention"), memory.read)
    token = torch.tensor([[65]])
    cached, again = (InferenceModel.advance(model, token, context)[0] for context in (memory.context, fresh))
    torch.testing.assert_close(cached, again, rtol=1e-4, atol=1e-4)


def test_only_new_tokens_are_read():
    answers = [written(" Hello.", EOD), written(" Fine", EOD), written(" Yes", EOD)]
    conversation, shown, model = talk(answers, ["hi", "how are you?", "sure?"])
    assert shown == [" Hello.", " Fine", " Yes"]
    text = "User: hi\nAssistant: Hello.\nUser: how are you?\nAssistant: Fine\nUser: sure?\nAssistant: Yes"
    # each once: the model never sees the end of a document in the middle of one
    assert model.read == written(text)
    assert conversation.tokens == tuple(written(text))


def test_an_answer_as_long_as_allowed_is_read_to_its_end():
    conversation, shown, model = talk([written("abc"), written("xyz")], ["1", "2"], limit=3)
    assert shown == ["abc", "xyz"]
    assert model.read == written("User: 1\nAssistant:abc\nUser: 2\nAssistant:xy")
    assert conversation._memory.unread == (ord("z"),)


def test_the_beginning_of_the_next_turn_stays_where_the_model_wrote_it():
    answers = [written(" a\nUser:"), written(" b\nUser:")]
    conversation, shown, model = talk(answers, ["hi", "ho"])
    assert shown == [" a", " b"]
    assert model.read == written("User: hi\nAssistant: a\nUser: ho\nAssistant: b\nUser")
    assert conversation._memory.unread == (ord(":"),)
    assert conversation._memory.rest == " "


def test_a_token_that_goes_on_after_the_stop_is_not_read():
    # ": I" is one token: only ":" of it belongs to the conversation
    answers = [written(" a\nUser", 257), written(" b", EOD)]
    conversation, shown, model = talk(answers, ["hi", "ho"])
    assert shown == [" a", " b"]
    assert model.read == written("User: hi\nAssistant: a\nUser: ho\nAssistant: b")


@pytest.mark.parametrize(
    ("answer", "shown", "again"),
    [
        (written(" ab###"), " ab", " ab"),
        (written(" b", 260, "#"), " b", " b"),
        # "a#" is one token, of which "a" counts: it is read anew as text
        (written(" b", 261, "##"), " ba", " ba"),
        # a token that begins inside a character and goes on after it
        (written(" b\N{EURO SIGN}###"), " b€", " b€"),
        ([*b" b\xe2", 262, *b"##"], " b€", " b€"),
        (written("###"), "", ""),
    ],
    ids=str,
)
def test_a_stop_string_of_the_users_is_taken_back(answer, shown, again):
    conversation, texts, model = talk([answer, written("x", EOD)], ["hi", "ho"], stops=["###"])
    assert texts == [shown, "x"]
    start = written("User: hi\nAssistant:")
    further = written(f"{again}\nUser: ho\nAssistant:x")
    assert model.read == start + answer[:-1] + further
    assert conversation.tokens == tuple(start + further)
    is_read(conversation, model, f"User: hi\nAssistant:{again}\nUser: ho\nAssistant:x\nUser: ")


def test_bytes_that_are_no_text_are_read_as_they_were_written():
    answer = [*b" \xff\xe2\x82"]
    conversation, shown, model = talk([[*answer, EOD], written("x", EOD)], ["hi", "ho"])
    assert shown[0] == " \ufffd\ufffd"
    assert model.read == [*written("User: hi\nAssistant:"), *answer, *written("\nUser: ho\nAssistant:x")]


def test_an_interrupted_answer_counts_as_far_as_it_came():
    answers = [[*written(" abc"), KeyboardInterrupt], written(" d", EOD)]
    conversation, shown, model = talk(answers, ["hi", "ho"])
    assert shown == [" abc", " d"]
    assert model.read == written("User: hi\nAssistant: abc\nUser: ho\nAssistant: d")
    is_read(conversation, model, "User: hi\nAssistant: abc\nUser: ho\nAssistant: d\nUser: ")


def test_a_turn_interrupted_before_its_answer_has_never_been():
    answers = [written(" a", EOD), [KeyboardInterrupt], written(" d", EOD)]
    conversation, shown, model = talk(answers, ["hi", "oops", "ho"])
    assert shown == [" a", "", " d"]
    is_read(conversation, model, "User: hi\nAssistant: a\nUser: ho\nAssistant: d\nUser: ")


def test_an_interrupt_goes_through_where_other_ranks_would_go_on():
    with pytest.raises(KeyboardInterrupt):
        talk([[*written(" a"), KeyboardInterrupt]], ["hi"], interruptible=False)


def test_a_stop_string_longer_than_the_answer_lets_all_of_it_pass():
    _, shown, _ = talk([written(" #\nUs", EOD)], ["hi"], stops=["####"])
    assert shown == [" #\nUs"]


def test_the_turns_of_longllama_are_tokenised_apart_and_end_documents():
    class Bos(Words):
        bos = 250

        def _encode_batch(self, texts, allow_special):
            return super()._encode_batch([text and f"~{text}" for text in texts], allow_special)

    answers = [written("A\nUSER:"), written("B", EOD), written("C", EOD)]
    conversation, shown, model = talk(answers, ["hi", "ho", "ha"], LONGLLAMA, tokenizer=Bos())
    assert shown == ["A", "B", "C"]
    preamble = (
        "A chat between a user (denoted as USER:) and an artificial intelligence assistant (denoted as ASSISTANT:). The"
        " assistant gives helpful, detailed, and polite answers to the user's questions.\n\n"
    )
    opening = [250, *written(f"~{preamble}~\nUSER: ~hi~\nASSISTANT: ")]
    further = [
        *written("A"),
        EOD,
        *written("~\nUSER: ~ho~\nASSISTANT: B"),
        EOD,
        *written("~\nUSER: ~ha~\nASSISTANT: C"),
    ]
    assert conversation.tokens == tuple(opening + further)
    # the first answer ran into the user's turn without its end of document
    assert model.read == opening + written("A\nUSER") + further


def test_a_conversation_draws_as_its_seed_says_and_differently_each_turn():
    def shown(seed):
        sampling = Sampling(temperature=2.0, seed=seed)
        conversation = Conversation(inference("window"), ByteTokenizer(), PLAIN, sampling, 12)
        answers = []
        for _ in range(2):
            conversation.ask("a", answers.append)
            answers.append("|")
        return "".join(answers)

    assert shown(3) == shown(3)
    assert shown(3) != shown(4)


def test_a_repetition_penalty_sees_the_whole_conversation():
    """Every byte can be written once: what was read in an earlier turn is not written again."""
    sampling = Sampling(temperature=0.0, repetition_penalty=1e6)
    conversation = Conversation(inference("llama"), ByteTokenizer(), PLAIN, sampling, 8)
    conversation.ask("a", lambda text: None)
    first = set(conversation.tokens)
    read = len(conversation.tokens)
    conversation.ask("b", lambda text: None)
    fed = written("\nUser: b\nAssistant:")
    new = conversation.tokens[read + 1 + len(fed) :]
    assert len(new) == 7
    assert not set(new) & (first | set(fed))


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """Bytes, <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258."""
    path = tmp_path_factory.mktemp("ranks") / "ranks.tiktoken"
    write_rank_file(path, {bytes([i]): i for i in range(256)}, r"\s|\S", {"<|endoftext|>": 256})
    tokenizer = TiktokenTokenizer(str(path), {"special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.bos = 256
    return tokenizer


def test_a_template_writes_special_tokens_and_the_user_does_not(special):
    found = template_format(TEMPLATE, special, "here")
    assert found == ChatFormat(
        user="<|endoftext|><|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        following="<|im_end|>\n<|im_start|>user\n",
        special=True,
    )
    assert found.stops(special) == ({256, 258}, [])
    answers = [[*written("A"), 258], [*written("B"), 256], [*written("C"), 258]]
    conversation, shown, model = talk(answers, ["hi", "<|im_end|>", "ho"], found, tokenizer=special)
    assert shown == ["A", "B", "C"]
    between = [258, *written("\n"), 257, *written("assistant\n")]
    user = [257, *written("user\n")]
    expected = [256, *user, *written("hi"), *between, *written("A"), 258, *written("\n"), *user]
    expected += [*written("<|im_end|>"), *between, *written("B"), 258, *written("\n"), *user]
    expected += [*written("ho"), *between, *written("C")]
    assert model.read == expected
    assert conversation.tokens == tuple(expected)


def test_transformers_gives_a_conversation_the_same_tokens(special, tmp_path):
    write_for_transformers(special, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("bos_token", "eos_token"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    answers = [[*written("A b"), 258], [*written("C"), 258], [*written("D"), 258]]
    found = choose_format(None, tmp_path, tokenizer)
    conversation, _, model = talk(answers, ["hi", "ho\nho", "ha €"], found, tokenizer=tokenizer)
    turns = [("user", "hi"), ("assistant", "A b"), ("user", "ho\nho"), ("assistant", "C"), ("user", "ha €")]
    messages = [{"role": role, "content": content} for role, content in turns]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True)
    assert list(conversation.tokens) == model.read == [*theirs["input_ids"], *written("D")]


def test_a_template_without_special_tokens_stops_at_the_users_turn(special):
    template = (
        "{% for m in messages %}{{ {'user': '### Human: ', 'assistant': '### Assistant: '}[m.role] }}{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}### Assistant: {% endif %}"
    )
    found = template_format(template, special, "here")
    assert (found.user, found.following) == ("### Human: ", "\n### Human: ")
    assert found.stops(special) == ({256}, ["\n### Human:"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "here is no chat template that works: Expected an expression"),
        ("{{ raise_exception('no\nsystem') }}", "no system. Give --chat-format plain"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ messages[0].content }}:", "leaves out a turn"),
        ("{% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}", "begins a first answer by '1'"),
    ],
)
def test_templates_that_cannot_be_used(special, template, message):
    with pytest.raises(UserError) as caught:
        template_format(template, special, "here")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_a_format_comes_from(tmp_path, special):
    def following(name=None):
        return choose_format(name, tmp_path, special).following

    assert following() == "\nUser: "
    assert following("longllama") == "\nUSER: "
    (tmp_path / "tokenizer").mkdir()
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert following() == "\nUser: "
    config.write_text(json.dumps({"chat_template": TEMPLATE.replace("im_end", "one")}))
    assert following().startswith("<|one|>")
    several = [{"name": name, "template": TEMPLATE.replace("im_end", name)} for name in ("tools", "default")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert following().startswith("<|default|>")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("im_end", "two"))
    assert following().startswith("<|two|>")
    (tmp_path / "own.jinja").write_text(TEMPLATE.replace("im_end", "three"))
    assert following(str(tmp_path / "own.jinja")).startswith("<|three|>")
    assert following("plain") == "\nUser: "
    with pytest.raises(UserError, match=r"chat format .*nowhere cannot be read \(No such file.* plain, longllama"):
        following(str(tmp_path / "nowhere"))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several[:1]}))
    with pytest.raises(UserError, match="has the chat templates tools"):
        following()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        following()


def spoken(answers, lines, trained_length=None):
    lines, text, reports = iter(lines), [], []
    conversation = Conversation(Scripted(*answers), Words(), PLAIN, GREEDY, 20)
    converse(conversation, lambda: next(lines, None), text.append, reports.append, trained_length)
    return conversation, "".join(text), reports


def test_commands_and_reports_of_a_session():
    answers = [written("A", EOD), written("B", EOD), written("C", EOD)]
    conversation, text, reports = spoken(
        answers, ["hi", "", "  ", "/what", "ho\n", "/reset", "/new is new", "/exit", "x"]
    )
    assert text == "A\nB\nC\n"
    assert conversation.tokens == tuple(written("User: /new is new\nAssistant:C"))
    assert [report.split(" at ")[0] for report in reports] == [
        "read 19 tokens, wrote 2",
        "there is no /what, only /reset and /exit",
        "read 20 tokens, wrote 2",
        "everything is forgotten",
        "read 28 tokens, wrote 2",
    ]
    # two states of (2, 16, 16) and (2,); keys and values of 2 heads of 8
    size = 4 * 2 * (2 * 16 * 16 + 2) + 4 * 2 * 2 * 8 * 41
    assert reports[2].endswith(f" tokens/s; 41 in the cache, {size:,} bytes")


def test_a_conversation_that_outgrows_the_training_is_told_once():
    answers = [written("A", EOD)] * 3
    _, text, reports = spoken(answers, ["hi", "hi", "hi"], trained_length=20)
    assert text == "A\nA\nA\n"
    told = [report for report in reports if "expect" in report]
    assert told == [
        "the conversation has 41 tokens, the model was trained to read 20: expect worse answers, or say /reset"
    ]
    assert reports.index(told[0]) == 2

"""What stands around the texts of a conversation: named formats, and the chat templates of transformers.

Sources: the format `longllama` is that of LongLLaMA's chat tuning (arXiv 2307.03170, code; every piece tokenised alone,
an end-of-document token after each answer); templates are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megayoco.convert.export import TOKENIZER_FOLDER
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A conversation is preamble, user, TEXT, assistant, ANSWER, following, TEXT, assistant, ANSWER, following, ..."""

    preamble: str = ""
    user: str
    """Before the first text of the user's."""
    assistant: str
    """Before each answer."""
    following: str
    """Between an answer and the user's next text."""
    special: bool = False
    """Strings of special tokens in the fields above are these tokens; in what the user writes they are plain text."""
    document: bool = False
    """The conversation begins with the beginning-of-text token, if there is one, and each answer ends a document."""
    apart: bool = False
    """Every piece is tokenised alone."""

    def opening(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The tokens up to the first answer."""
        begin = [tokenizer.bos] if self.document and tokenizer.bos is not None else []
        return begin + self._encode(tokenizer, [self.preamble, self.user], text)

    def further(self, tokenizer: Tokenizer, rest: str, text: str) -> list[int]:
        """The tokens from an answer to the next one.

        Args:
            tokenizer: of the model.
            rest: what is not read yet of the answer and, without `document`, of what follows it.
            text: the user's.
        """
        if not self.document:
            return self._encode(tokenizer, [rest], text)
        return [*tokenizer.encode(rest), tokenizer.eod, *self._encode(tokenizer, [self.following], text)]

    @property
    def continuing(self) -> str:
        """What comes right after an answer, as text."""
        return "" if self.document else self.following

    def stops(self, tokenizer: Tokenizer) -> tuple[set[int], list[str]]:
        """Ids and strings that end an answer: the end of a document, and what begins the user's next turn."""
        if self.special:
            first = _encode_special(tokenizer, self.following)[:1]
            if first and tokenizer.encode(tokenizer.decode(first)) != first:
                return {tokenizer.eod, *first}, []
        marker = self.following.rstrip()
        return {tokenizer.eod}, [marker] if marker else []

    def _encode(self, tokenizer: Tokenizer, before: Sequence[str], text: str) -> list[int]:
        pieces = [*before, text, self.assistant]
        if self.apart:
            return [token for piece in pieces for token in tokenizer.encode(piece)]
        if not self.special:
            return tokenizer.encode("".join(pieces))
        if _encode_special(tokenizer, text) == tokenizer.encode(text):
            return _encode_special(tokenizer, "".join(pieces))
        outside = [_encode_special(tokenizer, piece) for piece in ("".join(before), self.assistant)]
        return [*outside[0], *tokenizer.encode(text), *outside[1]]


FORMATS = {
    "plain": ChatFormat(user="User: ", assistant="\nAssistant:", following="\nUser: "),
    "longllama": ChatFormat(
        preamble="A chat between a user (denoted as USER:) and an artificial intelligence assistant (denoted as"
        " ASSISTANT:). The assistant gives helpful, detailed, and polite answers to the user's questions.\n\n",
        user="\nUSER: ",
        assistant="\nASSISTANT: ",
        following="\nUSER: ",
        document=True,
        apart=True,
    ),
}


def check_format(name: str) -> None:
    """Raises UserError unless `choose_format` finds a format or a file of this name: for before a model is read."""
    if name not in FORMATS:
        _read(Path(name))


def choose_format(name: str | None, folder: Path, tokenizer: Tokenizer) -> ChatFormat:
    """The format that `--chat-format` names: one of `FORMATS` or the file of a template.

    None: the template of the model's folder, `plain` without one.

    Raises:
        UserError: no such format or file, or a template that cannot be used.
    """
    if name in FORMATS:
        return FORMATS[name]
    if name is not None:
        return template_format(_read(Path(name)), tokenizer, f"--chat-format {name}")
    found = find_template(folder)
    return FORMATS["plain"] if found is None else template_format(found[0], tokenizer, str(found[1]))


def find_template(folder: Path) -> tuple[str, Path] | None:
    """The chat template of a model's folder, or of its tokenizer's folder, and its file; None: there is none.

    Raises:
        UserError: the file is damaged, or has several templates and none of them is called default.
    """
    for place in (folder, folder / TOKENIZER_FOLDER):
        path = place / "chat_template.jinja"
        if path.is_file():
            return _read(path), path
        path = place / "tokenizer_config.json"
        if path.is_file() and (template := _configured(path)) is not None:
            return template, path
    return None


def _configured(path: Path) -> str | None:
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}. Copy it again.") from error
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several, each with its name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise UserError(
                f"{path} has the chat templates {', '.join(map(str, named))}: save one in a file of its own"
                " and give it as --chat-format."
            )
        template = named["default"]
    return template if isinstance(template, str) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(FORMATS)
        raise UserError(
            f"chat format {path} cannot be read ({error.strerror}). Give a Jinja template, or one of {known}."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}). Convert it first.") from error


def template_format(template: str, tokenizer: Tokenizer, where: str) -> ChatFormat:
    """What a chat template of transformers writes around the texts.

    It is taken from two conversations rendered with placeholders, so an answer stays in the cache as the model wrote
    it, where a template might trim it or leave out its thoughts later.

    Args:
        template: Jinja.
        tokenizer: knows the special tokens.
        where: names the template in errors.

    Raises:
        UserError: it is no Jinja template, fails, leaves out a text, treats later turns otherwise than the first, or
            needs special tokens that the tokenizer cannot encode.
    """
    first, answer, second = (f"placeholder{number}text" for number in ("one", "two", "three"))
    turns = [("user", first), ("assistant", answer), ("user", second)]
    short, long = (_render(template, turns[:count], tokenizer, where) for count in (1, 3))
    user, assistant = _around(short, first, where)
    _, tail = _around(long, answer, where)
    following, again = _around(tail, second, where)
    if again != assistant:
        raise UserError(
            f"{where} is a template that begins a first answer by {assistant!r} and a later one by {again!r}, which"
            " a cached conversation cannot follow. Give --chat-format plain or another template."
        )
    made = ChatFormat(user=user, assistant=assistant, following=following, special=True)
    try:
        _encode_special(tokenizer, user + assistant + following)
    except UserError as error:
        raise UserError(
            f"{where} is a chat template: {tokenizer.type} encodes no special tokens. Give --chat-format plain, or"
            " the model its tokenizer.json."
        ) from error
    return made


def _render(template: str, turns: Sequence[tuple[str, str]], tokenizer: Tokenizer, where: str) -> str:
    # late: transformers takes a second. It renders in a sandbox: a template comes with a model, from anywhere
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        names = _special_names(tokenizer)
        texts: Any = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **names)[0]
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where} is no chat template that works: {reason}. Give --chat-format plain.") from error
    return str(texts[0])


def _special_names(tokenizer: Tokenizer) -> dict[str, Any]:
    named = getattr(tokenizer, "special_names", None)
    if named is not None:
        return dict(named())
    numbers = {"eos_token": tokenizer.eod, "bos_token": tokenizer.bos}
    return {key: tokenizer.decode([number]) for key, number in numbers.items() if number is not None}


def _around(text: str, placeholder: str, where: str) -> tuple[str, str]:
    before, found, after = text.partition(placeholder)
    if not found:
        raise UserError(f"{where} is a chat template that leaves out a turn. Give --chat-format plain.")
    return before, after


def _encode_special(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_documents([text], allow_special=True)[0].tolist()  # type: ignore[no-any-return]

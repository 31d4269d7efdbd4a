"""Regular expressions that cut text into words, as tiktoken (fancy-regex) and tokenizers (Oniguruma) read them.

Most of what such expressions use means the same in both. What does not: `{1,3}+` is possessive in fancy-regex and a
repetition of groups of three in Oniguruma, which would make one word of a long number; `$` is the end of the text in
one and of a line in the other; `\\w`, and what `(?i:)` folds with a pair of letters, differ in some characters.
"""

import re

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel(use_regex=True) of tokenizers cuts by."""

DIGITS_GPT2_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""Digits(individual_digits=True), then GPT2_PATTERN in what lies between, where a digit ends the text."""

_ATOM = r"""
    (?: \\[pP]\{(?:L|Lu|Ll|Lt|Lm|Lo|M|Mn|Mc|Me|N|Nd|Nl|No|P|S|Z|Zs|Han)\}
      | \\[sSrnt/]
      | \[\^?(?:\\[pP]\{(?:L[ultmo]?|M|N|P|S)\}|\\[sSrnt/\-]|[^\\\[\]^&-](?:-[^\\\[\]^&-])?)+\]
      | [^\\^$.*+?()\[\]{}|]
    )
"""
_COUNT = r"\{[0-9]+(?:,[0-9]*)?\}"

_SAME_MEANING = re.compile(
    rf"""(?x)
    (?: {_ATOM}
      | \((?:\?[:!=>]|(?!\?)) | \) | \|
      | \(\?i:(?![^()]*(?:ss|st|ff|fi|fl))[a-z'|\[\]]+\)
      | [?*+][+?]?
      | {_COUNT}(?![+?])
      | \\z
    )+"""
)
_POSSESSIVE_COUNT = re.compile(rf"(?x) ({_ATOM}) ({_COUNT}) \+")
_END = re.compile(r"(?<!\\)\$")


def means_the_same(pattern: str) -> bool:
    """Whether an expression is made only of what Oniguruma and fancy-regex understand alike."""
    return _SAME_MEANING.fullmatch(pattern) is not None


def for_oniguruma(pattern: str) -> str | None:
    """An expression that means to Oniguruma (and to fancy-regex) what `pattern` means to fancy-regex.

    None if it holds something that is not known to have one.
    """
    pattern = _POSSESSIVE_COUNT.sub(r"(?>\1\2)", pattern)
    pattern = _END.sub(r"\\z", pattern)
    return pattern if means_the_same(pattern) else None

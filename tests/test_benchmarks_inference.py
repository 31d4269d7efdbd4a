"""What benchmarks/inference.py compares: one function on both sides, memories that are values, caches by formula."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def subjects(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import inference_subjects

    return inference_subjects


def setting_of(subjects, dtype):
    return subjects.Setting(
        model="yoco-tiny", baseline="llama-tiny", layers=2, device="cpu", dtype=dtype, chunk=64, transformers_chunk=0
    )


def continued(subject, memory, steps):
    token, memory, tokens = 5, subject.branch(memory), []
    for _ in range(steps):
        token, memory = subject.next(token, memory)
        tokens.append(token)
    return tokens, memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_subject_branches_and_has_the_cache_of_the_formula(subjects, dtype):
    setting, prompt = setting_of(subjects, dtype), list(range(7, 307))
    for name in subjects.SUBJECTS:
        subject = subjects.build(name, setting)
        memory = subject.read(prompt, len(prompt) + 4)
        first, longer = continued(subject, memory, 4)
        assert continued(subject, memory, 4)[0] == first
        per_token, constant = subjects.cache_formula(subjects.config_of(name, setting), getattr(torch, dtype).itemsize)
        assert subject.cache_bytes(memory) == constant + 300 * per_token
        assert subject.cache_bytes(longer) == constant + 304 * per_token


def test_the_llama_of_transformers_is_ours(subjects):
    setting, prompt = setting_of(subjects, "float32"), list(range(7, 107))
    ours, theirs = (subjects.build(name, setting) for name in (subjects.LLAMA, subjects.TRANSFORMERS))
    expected = ours.logits(prompt)
    torch.testing.assert_close(theirs.logits(prompt), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert continued(theirs, theirs.read(prompt, 0), 3)[0] == continued(ours, ours.read(prompt, 103), 3)[0]

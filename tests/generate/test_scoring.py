"""Losses of a text equal those of the training module's forward, whatever chunks and batches they are computed in."""

import pytest
import torch
import torch.nn.functional as F

from megayoco.generate.scoring import score, score_continuations
from megayoco.ops.cross_entropy import linear_token_losses
from tests.generate.models import MODELS, SHAPE, build, inference

V = SHAPE["vocab_size"]
TEXT = torch.randint(0, V, (57,), generator=torch.Generator().manual_seed(4)).tolist()


def expected_losses(name, tokens, dtype=torch.float64):
    """(T - 1,) losses and (T - 1,) most likely tokens by the training module, which has no cache."""
    decoder, normed = build(name, dtype), []
    decoder.head.norm.register_forward_hook(lambda module, inputs, output: normed.append(output))
    ids = torch.tensor([tokens])
    with torch.no_grad():
        decoder(ids[:, :-1], ids[:, 1:])
    logits = normed[0][0] @ decoder.head.weight.t()
    return F.cross_entropy(logits, ids[0, 1:], reduction="none").detach(), logits.argmax(-1)


@pytest.mark.parametrize("chunk", [1, 10, 56, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_losses_of_a_text(name, chunk):
    scores = score(inference(name, torch.float64), TEXT, chunk=chunk)
    losses, likely = expected_losses(name, TEXT)
    torch.testing.assert_close(scores.losses, losses.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(scores.greedy, likely == torch.tensor(TEXT[1:]))
    assert scores.context.length == len(TEXT) - 1


def test_a_text_can_be_scored_in_two_parts():
    model = inference("retention", torch.float64)
    whole = score(model, TEXT)
    first = score(model, TEXT[:20])
    second = score(model, TEXT[19:], context=first.context)
    torch.testing.assert_close(torch.cat([first.losses, second.losses]), whole.losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 2048])
@pytest.mark.parametrize("name", MODELS)
def test_continuations_of_a_ragged_batch(name, chunk):
    model = inference(name, torch.float64)
    losses, likely = expected_losses(name, TEXT)
    certain = [*TEXT[:30], int(likely[29])]
    requests = [(TEXT[:40], TEXT[40:]), (TEXT[:1], TEXT[1:5]), (TEXT[:50], TEXT[50:51]), (certain[:-1], certain[-1:])]
    got = score_continuations(model, requests, chunk=chunk)
    for (total, greedy), (before, after) in zip(got[:3], requests[:3], strict=True):
        part = slice(len(before) - 1, len(before) + len(after) - 1)
        assert total == pytest.approx(-float(losses[part].sum()), abs=1e-6)
        assert greedy == bool((likely[part] == torch.tensor(after)).all())
    assert got[3][1] is True


def test_only_continuations_enter_the_cross_decoder():
    model, rows = inference("retention"), []
    for layer in model.stage.cross_layers:
        layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    score_continuations(model, [(TEXT[:40], TEXT[40:44]), (TEXT[:3], TEXT[3:5])])
    assert rows == [4, 4]


def test_token_losses_take_the_first_of_equal_logits_and_refuse_what_has_no_target():
    x, weight = torch.ones(3, 2), torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 3.0], [1.5, 1.5]])
    losses, greedy = linear_token_losses(x, weight, torch.tensor([1, 2, 0]), chunk_tokens=2)
    torch.testing.assert_close(losses, F.cross_entropy(x @ weight.t(), torch.tensor([1, 2, 0]), reduction="none"))
    assert greedy.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="needs a target"):
        linear_token_losses(x, weight, torch.tensor([1, -100, 0]))
    with pytest.raises(ValueError, match="not in the vocabulary"):
        linear_token_losses(x, weight, torch.tensor([1, 4, 0]))


def test_bad_arguments():
    model = inference("llama")
    with pytest.raises(ValueError, match="1 tokens in chunks of 2048"):
        score(model, TEXT[:1])
    with pytest.raises(ValueError, match="every request"):
        score_continuations(model, [(TEXT[:3], [])])
    with pytest.raises(ValueError, match="every request"):
        score_continuations(model, [])

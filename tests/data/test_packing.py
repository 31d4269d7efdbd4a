"""Documents packed into samples, from the file to the loss, in a model of every mixer: with document_mask each is a
forward pass of its own, without it the whole sample is one."""

import pytest
import torch

from megayoco.config import DataConfig, ModelConfig
from megayoco.data.batches import Batches
from megayoco.data.datasets import build_datasets
from megayoco.model.decoder import build_decoder
from megayoco.model.parameters import canonical_parameters

SHAPE = dict(dim=32, layers=4, hidden_dim=48, heads=4, kv_heads=2, vocab_size=256)
MODELS = {
    "retention and cross": dict(SHAPE, self_heads=2),
    "window and cross": dict(SHAPE, self_mixer="window", window=7),
    "full": dict(SHAPE, pattern="llama"),
}
T = 32


@pytest.fixture
def micro_batches(write_pair):
    """micro_batches(document_mask) -> all samples, and the first two micro-batches of three."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 40, 5, 3, 17, 2, 33, 1, 1, 24, 9, 70, 6, 12]
    documents = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    prefix = write_pair("documents", documents, 256)
    data = DataConfig(train=prefix, split="1,0,0")
    train = build_datasets(data, sequence_length=T, seed=2, vocab_size=256).train

    def make(document_mask):
        batches = Batches(
            train, batch_size=6, micro_batch_size=3, data_rank=0, data_size=1, document_mask=document_mask, prefetch=0
        )
        return train, batches.next_step()

    return make


def loss_and_gradients(model, calls):
    """Of the sum over calls of the decoder; and the number of targets."""
    decoder = build_decoder(ModelConfig(**MODELS[model]), None, seed=5, dtype=torch.float64)
    results = [decoder(*call) for call in calls]
    total = torch.stack([loss for loss, _ in results]).sum()
    total.backward()
    gradients = {key: value.grad for key, value in canonical_parameters(decoder).items()}
    return total.item(), sum(int(count) for _, count in results), gradients


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("document_mask", [True, False])
def test_packed_samples_equal_separate_forward_passes(micro_batches, model, document_mask):
    train, packed = micro_batches(document_mask)
    alone = []
    for number in range(6):
        sample = train[number]
        # no loss across a border: the last token of a piece has no target
        pieces = torch.from_numpy(sample["tokens"])
        ends = sample["borders"].tolist() if document_mask else []
        for begin, end in zip([0, *ends], [*ends, T + 1], strict=True):
            if end - begin > 1:
                alone.append((pieces[None, begin : end - 1], pieces[None, begin + 1 : end]))
    assert sum(len(sample["borders"]) for sample in map(train.__getitem__, range(6))) > 6
    loss, count, gradients = loss_and_gradients(model, packed)
    expected_loss, expected_count, expected = loss_and_gradients(model, alone)
    assert count == expected_count == sum(call[1].numel() for call in alone)
    # fp32 angles at other positions: equal to their rounding
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for key, value in expected.items():
        tolerance = 1e-4 * float(value.abs().max()) + 1e-12
        torch.testing.assert_close(gradients[key], value, rtol=1e-4, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


def test_the_mask_changes_the_loss(micro_batches):
    losses = [loss_and_gradients("retention and cross", micro_batches(mask)[1])[:2] for mask in (True, False)]
    assert losses[0][1] < losses[1][1] == 6 * T

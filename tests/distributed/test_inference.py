"""A model cut over ranks says what one process says: logits, losses, tokens, with a cache and in chunks."""

import pytest
import torch

from tests.generate.models import MODELS, SHAPE, build, weights

PROMPTS = [[5, 6, 7] * 9, [200, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
LAYOUTS = {
    "tensor-2": (2, 1, 1),
    "tensor-4": (4, 1, 1),
    "pipeline-2": (1, 2, 1),
    "pipeline-4": (1, 4, 1),
    "both": (2, 2, 1),
    "sequence-3": (1, 1, 3),
    "sequence-tensor": (2, 1, 2),
    "sequence-pipeline": (1, 2, 2),
}


def answers(model):
    """What one rank finds out; nothing in it depends on the layout."""
    from megayoco.generate.generation import generate, generate_batch, prefill
    from megayoco.generate.sampling import GREEDY, Sampling
    from megayoco.generate.scoring import score, score_continuations
    from megayoco.model.inference import cache_bytes

    text = [(7 * i * i + 3) % SHAPE["vocab_size"] for i in range(50)]
    ids = torch.tensor([text])
    context = prefill(model, text[:30], chunk=7)
    logits, after = model.advance(ids[:, 30:41], context, last_only=False)
    branch, _ = model.advance(ids[:, 3:8], context)
    last, _ = model.advance(ids[:, 41:], after)
    scores = score(model, text, chunk=9)
    drawn = Sampling(temperature=1.5, top_k=30)  # no seed: the ranks must agree on one
    return {
        "logits": logits,
        "branch": branch,
        "last": last,
        "losses": scores.losses,
        "greedy": scores.greedy,
        "continuations": score_continuations(model, [(text[:9], text[9:12]), (text[:3], text[3:20])], chunk=4),
        "tokens": list(generate(model, text, 6, GREEDY, prefill_chunk=8)),
        "batch": generate_batch(model, PROMPTS, [6, 3, 5], GREEDY, prefill_chunk=8),
        "drawn": list(generate(model, text, 8, drawn)),
        "cache": cache_bytes(after),
        "replica": (model.replica, model.replicas, model.is_lead),
    }


def on_a_rank(name, tensor, pipeline, sequence, windows=None):
    from megayoco.config import ParallelConfig
    from megayoco.convert.weights import HeldTensors, Weights
    from megayoco.generate.loading import load_weights
    from megayoco.model.inference import MemoryOptions
    from megayoco.parallel.topology import build_topology

    stored = Weights(MODELS[name], HeldTensors(weights(build(name, torch.float64))), None, {})
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence)
    topology = build_topology(parallel, MODELS[name])
    memory = MemoryOptions(shared=sequence > 1)
    model = load_weights(stored, dtype=torch.float64, topology=topology, memory=memory, windows=windows)
    held = {id(p): p.numel() for p in model.stage.parameters()}
    return {**answers(model), "held": sum(held.values())}


@pytest.mark.parametrize(
    ("name", "layout", "windows"),
    [
        ("retention", "tensor-2", {}),
        ("retention", "pipeline-4", {}),
        ("retention", "both", {}),
        ("window", "tensor-4", {}),
        ("window", "pipeline-2", {}),
        ("uneven", "pipeline-4", {}),
        ("llama", "tensor-4", {}),
        ("llama", "pipeline-2", {}),
        ("llama", "both", {}),
        ("longllama", "tensor-4", {}),
        ("longllama", "both", {}),
        ("memory", "pipeline-2", {}),
        ("longllama", "tensor-2", {"evicted": 2, "capacity": 8}),
        ("longllama", "pipeline-2", {"evicted": 1}),
        ("longllama", "pipeline-2", {"last_context": 3}),
        ("longllama", "sequence-3", {}),
        ("longllama", "sequence-tensor", {"evicted": 2}),
        ("memory", "sequence-pipeline", {"last_context": 3}),
    ],
    ids=str,
)
def test_every_rank_says_what_one_process_says(workers, name, layout, windows):
    from megayoco.model.inference import InferenceModel
    from megayoco.model.window_options import WindowOptions

    tensor, pipeline, sequence = LAYOUTS[layout]
    whole, options = build(name, torch.float64), WindowOptions(**windows)
    expected = answers(InferenceModel.of(whole, windows=options))
    ranks = workers.run(on_a_rank, name, *LAYOUTS[layout], options, world=tensor * pipeline * sequence)
    for got in ranks:
        for key in ("logits", "branch", "last", "losses"):
            torch.testing.assert_close(got[key], expected[key], rtol=1e-9, atol=1e-9, msg=key)
        for (sum_got, all_got), (sum_expected, all_expected) in zip(
            got["continuations"], expected["continuations"], strict=True
        ):
            assert sum_got == pytest.approx(sum_expected, abs=1e-8)
            assert all_got == all_expected
        assert torch.equal(got["greedy"], expected["greedy"])
        assert got["tokens"] == expected["tokens"]
        assert got["batch"] == expected["batch"]
        assert got["drawn"] == ranks[0]["drawn"]
        assert got["replica"][:2] == (0, 1)
    assert [got["replica"][2] for got in ranks] == [True] + [False] * (len(ranks) - 1)
    # the model and its cache are really spread
    if sequence > 1:  # of the memory a part and the window, and the model if there are other ranks for it
        assert max(got["cache"] for got in ranks) < 0.9 * expected["cache"]
        return
    size = sum(p.numel() for p in whole.parameters())
    assert max(got["held"] for got in ranks) < 0.9 * size
    if pipeline == 1 and tensor == 2:
        assert ranks[0]["cache"] == pytest.approx(expected["cache"] / 2)


def two_copies(name):
    from megayoco.config import ParallelConfig
    from megayoco.convert.weights import HeldTensors, Weights
    from megayoco.generate.generation import generate
    from megayoco.generate.loading import load_weights
    from megayoco.generate.sampling import GREEDY
    from megayoco.parallel.topology import build_topology

    stored = Weights(MODELS[name], HeldTensors(weights(build(name, torch.float64))), None, {})
    topology = build_topology(ParallelConfig(tensor=2), MODELS[name])
    model = load_weights(stored, dtype=torch.float64, topology=topology)
    # copies work on prompts of their own, without waiting for one another
    prompt = PROMPTS[model.replica * 2]
    return model.replica, model.replicas, list(generate(model, prompt, 4 + 3 * model.replica, GREEDY))


def test_copies_of_a_model_work_on_prompts_of_their_own(workers):
    from megayoco.generate.generation import generate
    from megayoco.generate.sampling import GREEDY
    from megayoco.model.inference import InferenceModel

    model = InferenceModel.of(build("retention", torch.float64))
    expected = [(r, 2, list(generate(model, PROMPTS[2 * r], 4 + 3 * r, GREEDY))) for r in range(2)]
    got = workers.run(two_copies, "retention", world=4)
    assert got == [expected[0], expected[0], expected[1], expected[1]]

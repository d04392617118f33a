from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from worker_runs import make_model

from launcher.errors import ModelError
from launcher.strategy import LOSS_CHUNK_ELEMENTS
from launcher.worker.loss import chunked_cross_entropy, num_loss_chunks, use_chunked_loss
from launcher.worker.storage_tracker import StorageTracker

pytestmark = pytest.mark.integration


def plain_loss(hidden: torch.Tensor, labels: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    """The textbook loss: all logits at once, token n predicts token n + 1."""
    logits = layer(hidden)[:, :-1].reshape(-1, layer.out_features)
    return functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100)


def targets(labels: torch.Tensor) -> torch.Tensor:
    """Return for each token the next one; the last has none."""
    return functional.pad(labels[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("num_chunks", [1, 3, 30])
def test_chunks_give_the_loss_and_gradients_of_the_whole(num_chunks: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 40, bias=False)
    hidden = torch.randn(2, 11, 8, requires_grad=True)
    labels = torch.randint(40, (2, 11))
    labels[0, :4] = -100
    expected = torch.autograd.grad(plain_loss(hidden, labels, layer), [hidden, layer.weight])
    loss = chunked_cross_entropy(hidden, targets(labels), layer, num_chunks=num_chunks)
    torch.testing.assert_close(loss, plain_loss(hidden, labels, layer))
    found = torch.autograd.grad(loss, [hidden, layer.weight])
    torch.testing.assert_close(found, expected)


def test_a_batch_shorter_than_the_number_of_chunks_has_empty_ones() -> None:
    # Ranks with short batches must call the output layer as often as the others do.
    calls = []
    layer = torch.nn.Linear(8, 40)
    layer.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    hidden, labels = torch.randn(1, 3, 8), torch.tensor([[1, 2, 3]])
    loss = chunked_cross_entropy(hidden, targets(labels), layer, num_chunks=5)
    torch.testing.assert_close(loss, plain_loss(hidden, labels, layer))
    assert calls[:5] == [1, 1, 1, 0, 0]


def test_the_global_number_of_tokens_divides_the_sum() -> None:
    layer = torch.nn.Linear(8, 40)
    hidden, labels = torch.randn(1, 5, 8), torch.randint(40, (1, 5))
    loss = chunked_cross_entropy(hidden, targets(labels), layer, num_chunks=2, num_items_in_batch=8)
    torch.testing.assert_close(loss, plain_loss(hidden, labels, layer) * 4 / 8)


def test_a_batch_without_labels_has_a_loss_of_zero() -> None:
    layer = torch.nn.Linear(8, 40)
    labels = torch.full((1, 5), -100)
    loss = chunked_cross_entropy(torch.randn(1, 5, 8), targets(labels), layer, num_chunks=2)
    assert loss.item() == 0


def test_logits_of_the_whole_batch_never_exist() -> None:
    layer = torch.nn.Linear(16, 1000, bias=False)
    hidden = torch.randn(1, 640, 16, requires_grad=True)
    labels = torch.randint(1000, (1, 640))
    with StorageTracker() as tracker:
        chunked_cross_entropy(hidden, targets(labels), layer, num_chunks=64).backward()
    # Logits of 10 tokens are 40 kB, of all 2.56 MB; the weight's gradient is 64 kB, twice.
    assert tracker.peak_bytes < 0.5e6


def test_the_number_of_chunks_follows_from_the_largest_batch() -> None:
    # 4096 tokens x 128,256 = 525,336,576 logits; 2**25 = 33,554,432 a chunk: 15.66 chunks.
    assert LOSS_CHUNK_ELEMENTS == 33_554_432
    assert num_loss_chunks(max_tokens=4096, vocab_size=128_256) == 16
    assert num_loss_chunks(max_tokens=1, vocab_size=10) == 1


def test_a_model_keeps_its_loss_and_its_generation(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"))
    tokens = torch.randint(256, (2, 12))
    before = model(input_ids=tokens, labels=tokens).loss
    logits = model(input_ids=tokens).logits
    use_chunked_loss(model, max_tokens=24)
    output = model(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(output.loss, before)
    assert output.logits is None
    torch.testing.assert_close(model(input_ids=tokens).logits, logits)
    assert model.generate(input_ids=tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"))
    model.config.logits_scaling = 8.0
    with pytest.raises(ModelError, match="logits_scaling"):
        use_chunked_loss(model, max_tokens=24)

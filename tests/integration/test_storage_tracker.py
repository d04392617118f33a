from __future__ import annotations

import gc

import pytest
import torch

from launcher.worker.storage_tracker import StorageTracker

pytestmark = pytest.mark.integration

KIB = 1024


def test_a_storage_counts_once_however_many_views_share_it() -> None:
    with StorageTracker() as tracker:
        base = torch.empty(KIB, dtype=torch.float32)
        views = [base.view(2, -1), base[:10], base.t(), base.detach()]
        assert tracker.current_bytes == 4 * KIB
    del base, views
    assert tracker.current_bytes == 0
    assert tracker.peak_bytes == 4 * KIB


def test_a_view_keeps_the_whole_storage_alive() -> None:
    with StorageTracker() as tracker:
        view = torch.empty(KIB)[:1]
        assert tracker.current_bytes == 4 * KIB
        del view
        assert tracker.current_bytes == 0


def test_the_peak_is_the_highest_sum_of_what_lives_together() -> None:
    with StorageTracker() as tracker:
        first = torch.empty(KIB)
        second = torch.empty(2 * KIB)
        del second
        third = torch.empty(KIB)
        assert (tracker.current_bytes, tracker.peak_bytes) == (8 * KIB, 12 * KIB)
        tracker.reset_peak()
        assert tracker.peak_bytes == 8 * KIB
        del first, third


def test_storage_resize_changes_the_count_in_both_directions() -> None:
    with StorageTracker() as tracker:
        tensor = torch.empty(KIB)
        tensor.untyped_storage().resize_(0)
        assert tracker.current_bytes == 0
        tensor.untyped_storage().resize_(8 * KIB)
        assert tracker.current_bytes == 8 * KIB
        tensor.resize_(4 * KIB)
        assert tracker.current_bytes == 16 * KIB
    plain = torch.empty(1)
    plain.untyped_storage().resize_(0)
    assert tracker.current_bytes == 16 * KIB


def test_swapping_param_data_frees_the_old_storage() -> None:
    with StorageTracker() as tracker:
        param = torch.nn.Parameter(torch.empty(KIB))
        param.data = torch.empty(2 * KIB)
        assert tracker.current_bytes == 8 * KIB
        param.data = torch.empty(0)
        assert tracker.current_bytes == 0


def test_saved_activations_die_in_backward_and_gradients_stay() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64))
    x = torch.randn(8, 64)
    with StorageTracker() as tracker:
        tracker.add_external_all([weight, x])
        base = tracker.current_bytes
        assert base == 4 * (64 * 64 + 8 * 64)
        loss = (x @ weight).exp().sum()
        assert tracker.current_bytes == base + 4 * 8 * 64 + 4  # exp saves its output only
        loss.backward()
        del loss
        assert tracker.current_bytes == base + 4 * 64 * 64


def test_tensors_made_before_the_mode_count_only_when_added_and_once() -> None:
    made_before = torch.empty(KIB)
    with StorageTracker() as tracker:
        assert tracker.current_bytes == 0
        tracker.add_external(made_before)
        tracker.add_external(made_before[:5])
        assert tracker.current_bytes == 4 * KIB


def test_the_host_has_an_account_of_its_own() -> None:
    with StorageTracker() as tracker:
        tracker.placement = "host"
        tensor = torch.empty(KIB)
        assert (tracker.current_bytes, tracker.host_bytes) == (0, 4 * KIB)
        assert tracker.peak_bytes == 0
        del tensor
        assert (tracker.host_bytes, tracker.peak_host_bytes) == (0, 4 * KIB)


def test_the_listing_names_what_lived_at_the_peak_and_nothing_else() -> None:
    with StorageTracker() as tracker:
        early = torch.empty(KIB)
        del early
        kept = torch.empty(3, KIB, dtype=torch.bfloat16)
        tracker.tag = "backward"
        at_peak = [torch.zeros(KIB), torch.zeros(KIB)]
        del at_peak
        later = torch.ones(KIB)
        groups = tracker.live_at_peak()
    assert [(g.op, g.shape, g.dtype, g.tag, g.count, g.num_bytes) for g in groups] == [
        ("zeros.default", (KIB,), "float32", "backward", 2, 8 * KIB),
        ("empty.memory_format", (3, KIB), "bfloat16", "", 1, 6 * KIB),
    ]
    assert sum(g.num_bytes for g in groups) == tracker.peak_bytes
    del kept, later


def test_the_listing_sums_to_the_peak_after_resizes() -> None:
    with StorageTracker() as tracker:
        a, b = torch.empty(KIB), torch.empty(2 * KIB)
        a.untyped_storage().resize_(100)
        del b
        assert tracker.peak_bytes == 12 * KIB
        assert sum(g.num_bytes for g in tracker.live_at_peak()) == 12 * KIB
        tracker.reset_peak()
        assert sum(g.num_bytes for g in tracker.live_at_peak()) == 100


def test_meta_tensors_count_only_when_asked() -> None:
    with StorageTracker() as tracker:
        ignored = torch.empty(KIB, device="meta")
        assert tracker.current_bytes == 0
    with StorageTracker(include_meta=True) as tracker:
        counted = torch.empty(KIB, device="meta")
        assert tracker.current_bytes == 4 * KIB
    del ignored, counted


def test_an_output_written_through_out_is_counted() -> None:
    with StorageTracker() as tracker:
        out = torch.empty(0)
        torch.cat([torch.ones(KIB), torch.ones(KIB)], out=out)
        gc.collect()
        assert tracker.current_bytes == 8 * KIB


def test_non_reentrant_checkpointing_is_counted_as_it_runs() -> None:
    """Two layers of width 64: only each layer's input survives the forward pass."""
    layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(2)]
    x = torch.randn(8, 64, requires_grad=True)
    with StorageTracker() as tracker:
        tracker.add_external_all([x, *(p for layer in layers for p in layer.parameters())])
        base = tracker.current_bytes
        hidden = x
        for layer in layers:
            hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
        # The first layer's output (input of the second) and the second's output.
        assert tracker.current_bytes == base + 2 * 4 * 8 * 64
        hidden.sum().backward()
        del hidden
        grads = 4 * 8 * 64 + 2 * 4 * (64 * 64 + 64)
        assert tracker.current_bytes == base + grads


def test_what_is_computed_from_host_tensors_alone_is_host_memory() -> None:
    with StorageTracker() as tracker:
        tracker.placement = "host"
        host = torch.empty(KIB)
        tracker.placement = None
        states = torch.zeros_like(host)
        assert (tracker.current_bytes, tracker.host_bytes) == (0, 8 * KIB)
        mixed = states + torch.ones(KIB)
        assert tracker.current_bytes == 4 * KIB
        tracker.placement = "host"
        placed = torch.ones(KIB)
        assert (tracker.current_bytes, tracker.host_bytes) == (4 * KIB, 12 * KIB)
    del mixed, placed

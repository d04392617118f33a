from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.integration


def product_and_gradient(matmul: Any) -> tuple[Any, Any, Any]:
    import bitsandbytes
    import torch

    torch.manual_seed(0)
    whole_oi = torch.randn(64, 128)
    packed, state = bitsandbytes.functional.quantize_4bit(
        whole_oi, quant_type="nf4", compress_statistics=True
    )
    inputs_si = torch.randn(5, 128, requires_grad=True)
    weight = torch.nn.Parameter(packed, requires_grad=False)
    product_so = matmul(inputs_si, weight, quant_state=state)
    held = getattr(product_so.grad_fn, "tensors", None)
    product_so.square().sum().backward()
    return product_so, inputs_si.grad, held


def test_the_product_and_its_gradient_are_those_of_bitsandbytes_with_no_weights_held() -> None:
    import bitsandbytes
    import torch

    from launcher.worker import gathered_4bit

    theirs = product_and_gradient(bitsandbytes.matmul_4bit)
    ours = product_and_gradient(gathered_4bit._matmul_4bit)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    # What this module exists for: bitsandbytes holds the packed weights in the graph.
    assert theirs[2] is not None
    assert theirs[2][1] is not None
    assert ours[2] == (None, None)

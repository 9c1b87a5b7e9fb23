"""A model computes with the weights of any version that is kept, and with its own again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qarl.quant.linear import align_linears, requantize
from qarl.quant.scheme import QuantScheme
from trainer.kept_weights import KeptWeights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_is_that_of_its_version(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).to(dtype)
    align_linears(model, QuantScheme(ignore=()), "torch")
    kept, input_SK, outputs = KeptWeights(model), torch.randn(9, 64, dtype=dtype), []
    for version in range(4):
        with torch.no_grad():
            outputs.append(model(input_SK))
            kept.keep(version, oldest=version - 2)
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        requantize(model)
    now, weights = model(input_SK).detach(), [parameter.detach().clone() for parameter in model.parameters()]
    assert len({output.sum().item() for output in (*outputs, now)}) == 5
    for version in (3, 1, 2):
        with kept.of(version):
            assert torch.equal(model(input_SK), outputs[version])
        assert torch.equal(model(input_SK), now)
    with pytest.raises(ZeroDivisionError), kept.of(1):
        raise ZeroDivisionError
    assert all(map(torch.equal, model.parameters(), weights))
    with pytest.raises(KeyError), kept.of(0):
        pass

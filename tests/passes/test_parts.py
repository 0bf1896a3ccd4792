"""Graphs are cut into parts in a time that grows as they do."""

from compressai.models import MeanScaleHyperprior
from torch import Tensor, nn

from fmpq_fx.passes.parts import cut
from fmpq_fx.passes.trace import trace


class Residual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.relu()


def test_residual_blocks_in_a_row_are_one_part() -> None:
    # Through 200 blocks there are 2^200 ways: to visit each node once for each way would never end.
    model = MeanScaleHyperprior(8, 12)
    model.h_s.extend([Residual() for _ in range(200)])
    parts = {part.name: part for part in cut(trace(model))}
    assert list(parts) == ["analysis", "hyper_analysis", "hyper_synthesis", "synthesis"]
    assert len(parts["hyper_synthesis"].nodes) > 400

"""The arithmetic of a tensor-parallel engine, which divides each linear layer among processes.

Most layers are divided by outputs, which changes no value. The layers of `ROW_PARALLEL` are divided by inputs: each
process multiplies a slice of the inputs by a slice of the weight, and the products are added. Suffixes: N outputs, K
inputs.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from qarl.numerics.processor import round_as_engine

ROW_PARALLEL = ("o_proj", "down_proj")
"""Last part of the names of layers that are divided by inputs."""
EXACT_ON_CPU = 2
"""Most processes of an engine on CPU. Each adds what the others computed to its own product, so that from three on
every process has another order of the sum, and goes on with other bits."""


def shards_of(name: str, shards: int) -> int:
    """In how many slices of its inputs the engine computes the layer called `name`."""
    return shards if name.rpartition(".")[2] in ROW_PARALLEL else 1


def input_slice(tensors: Mapping[str, Tensor], shard: int, shards: int) -> dict[str, Tensor]:
    """What process `shard` holds of the tensors of a layer that is divided by inputs.

    Matrices are [N, K]. Scales of channels, [N, 1], and the bias are whole in every process.
    """
    return {
        kind: tensor.chunk(shards, 1)[shard].contiguous() if tensor.dim() == 2 and tensor.shape[1] > 1 else tensor
        for kind, tensor in tensors.items()
    }


def all_reduce(products: Sequence[Tensor]) -> Tensor:
    """The sum of the processes' products, which they rounded to the model's dtype: added in float32, rounded once."""
    first, *others = products
    if not others:
        return first
    total = first.float()
    for product in others:
        total = total + product.float()
    return round_as_engine(total, first.dtype)

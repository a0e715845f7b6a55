"""The low-rank maps of one token against float64."""

import pytest
import torch

pytest.importorskip("triton")

from triton_interpreter import POISONED_KERNELS, launches

from visualrwkv_hf import kernel_backend
from visualrwkv_hf.low_rank import FEW_ROWS, FUNCTIONS
from visualrwkv_hf.low_rank import low_rank as plain
from visualrwkv_hf.triton_kernels.low_rank import FUNCTIONS as OF_KERNEL
from visualrwkv_hf.triton_kernels.low_rank import _low_rank, low_rank

pytestmark = POISONED_KERNELS

# Computed in float32 and rounded once, to the dtype of x: half a unit of 8 or 11 bits; sums of up to 1,100 terms.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}

MAPS = {  # C, A, ranks
    "tiny": (48, 40, [8, 3, 16]),
    "one": (768, 768, [64]),
    "unequal": (1100, 130, [64, 33, 160, 96]),  # three splits, the last of them not full
}
NAMES = ("tanh", "identity", "sigmoid", "identity")


def inputs(maps: str, B: int, dtype: torch.dtype = torch.float32, time: tuple[int, ...] = (1,)):
    C, A, ranks = MAPS[maps]
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(B, *time, C, generator=generator).to(dtype) for _ in ranks]
    down = [(torch.randn(C, D, generator=generator) / C**0.5).to(dtype) for D in ranks]
    up = [(torch.randn(D, A, generator=generator) / D**0.5).to(dtype) for D in ranks]
    return x, down, up, NAMES[: len(ranks)]


@pytest.mark.parametrize("time", [(), (1,)], ids=["BC", "B1C"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("maps", MAPS)
def test_maps_match_float64(maps, B, dtype, time):
    x, down, up, names = inputs(maps, B, dtype, time)
    y = low_rank(x, down, up, names)
    assert y.shape == (len(x), B, *time, MAPS[maps][1]) and y.dtype == dtype
    for ours, x_m, w1, w2, name in zip(y, x, down, up, names):
        truth = FUNCTIONS[name](x_m.double() @ w1.double()) @ w2.double()
        assert (ours.double() - truth).norm() < TOLERANCE[dtype] * truth.norm()


def test_functions_at_their_ends():
    """tanh is computed as 2 sigmoid(2 x) - 1: nothing overflows, and of small x it keeps seven decimals."""
    x = torch.tensor([-1e4, -30.0, -1e-3, 0, 1e-3, 30.0, 1e4]).view(-1, 1)
    one = [torch.ones(1, 1)]
    for name in FUNCTIONS:
        y = torch.cat([low_rank([row[None]], one, one, [name])[0] for row in x])
        torch.testing.assert_close(y, FUNCTIONS[name](x), atol=2e-7, rtol=1e-6)


def test_layouts_do_not_matter():
    x, down, up, names = inputs("tiny", 2)
    expected = low_rank(x, down, up, names)
    strided = [w.T.contiguous().T for w in down], [w.T.contiguous().T for w in up]
    assert torch.equal(low_rank(x, *strided, names), expected)


@torch.no_grad()
@pytest.mark.parametrize("B, T, launched", [(1, 1, 2), (FEW_ROWS, 1, 2), (FEW_ROWS + 1, 1, 0), (1, 2, 0)])
def test_the_kernel_serves_few_rows_of_one_token(B, T, launched):
    x, down, up, names = inputs("tiny", B, time=(T,))
    with kernel_backend("torch"):
        expected = plain(x, down, up, names)
    with kernel_backend("triton"), launches() as seen:
        actual = plain(x, down, up, names)
    assert len(seen) == launched
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs)


def test_with_gradients_plain_torch_computes():
    x, down, up, names = inputs("tiny", 1)
    down[0].requires_grad_()
    with kernel_backend("triton"), launches() as seen:
        plain(x, down, up, names)[0].sum().backward()
    assert not seen and down[0].grad.any()
    with pytest.raises(RuntimeError, match="low_rank has no gradient"):
        low_rank(x, down, up, names)


def test_op_is_what_it_says():
    x, down, up, names = inputs("tiny", 2)
    indices = [OF_KERNEL.index(name) for name in names]
    torch.library.opcheck(_low_rank, (x, down, up, indices))


@torch.no_grad()
def test_compiles_as_one_graph():
    x, down, up, names = inputs("tiny", 2)
    expected = low_rank(x, down, up, names) * 2
    step = torch.compile(lambda *tensors: low_rank(*tensors, names) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(x, down, up), expected)


def test_the_kernel_knows_all_functions():
    assert tuple(FUNCTIONS) == OF_KERNEL[: len(FUNCTIONS)]


def test_a_batch_may_be_empty():
    x, down, up, names = inputs("tiny", 0)
    assert low_rank(x, down, up, names).shape == (3, 0, 1, 40)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(functions=("tanh",)), r"M >= 1 maps each, got \(3, 3, 3, 1\)"),
        (dict(functions=("tanh", "relu", "gelu")), "got gelu, relu"),
        (dict(x=[torch.zeros(2, 2, 48)] * 3), r"\[B, C\] or \[B, 1, C\], got \[2, 2, 48\]"),
        (dict(up=[torch.zeros(8, 40)] * 3), r"and \[D, 40\], got \[2, 48\], \[48, 3\] and \[8, 40\]"),
        (dict(x=[torch.zeros(2, 48, dtype=torch.float64)] * 3), "float64"),
        (dict(x=[torch.zeros(65_536, 48)] * 3), "at most 65,535 rows, got 65,536"),
    ],
)
def test_refusals(change, said):
    x, down, up, names = inputs("tiny", 2, time=())
    with pytest.raises(ValueError, match=said):
        low_rank(**dict(x=x, down=down, up=up, functions=names) | change)

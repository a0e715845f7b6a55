"""Scan orders against the original's, against their definitions and against a loop over pictures."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visualrwkv_hf.scan_orders import (
    SCANS,
    grid_permutation,
    inverse_order,
    is_identity,
    num_directions,
    sequence_orders,
)

scans = st.sampled_from(list(SCANS))
sides = st.integers(1, 9)
PATHS = ("snake", "spiral")
"""Scans that only ever step to a neighbour."""


def orders_of(scan, height, width):
    return [grid_permutation(scan, d, height, width) for d in range(num_directions(scan))]


# --- one picture --------------------------------------------------------------------------------------


def test_orders_equal_original(golden_folder):
    golden = json.loads((golden_folder / "a_rwkv5" / "scan_orders" / "orders.json").read_text())
    assert set(golden) == {str(n) for n in range(1, 13)}
    for n, orders in golden.items():
        for scan, order in orders.items():
            assert grid_permutation(scan, 0, int(n), int(n)).tolist() == order, (scan, n)


@pytest.mark.parametrize(
    ("scan", "expected"),
    [
        ("unidirectional", [[0, 1, 2, 3, 4, 5]]),
        ("bidirectional", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]),
        (
            "multidirectional",
            [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]],
        ),
        ("snake", [[0, 1, 2, 5, 4, 3]]),
        ("spiral", [[0, 1, 2, 5, 4, 3]]),
        ("zigzag", [[0, 1, 3, 4, 2, 5]]),
    ],
)
def test_orders_of_two_rows_of_three(scan, expected):
    assert [order.tolist() for order in orders_of(scan, 2, 3)] == expected


def test_every_scan_is_in_the_example_above():
    (parameters,) = (mark.args[1] for mark in test_orders_of_two_rows_of_three.pytestmark)
    assert [scan for scan, _ in parameters] == list(SCANS)


@given(scans, sides, sides)
def test_every_scan_is_a_permutation_and_its_inverse_undoes_it(scan, height, width):
    patches = torch.arange(height * width)
    for order in orders_of(scan, height, width):
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, patches)
        assert torch.equal(order[inverse_order(order)], patches)
        assert torch.equal(inverse_order(order)[order], patches)


@given(st.sampled_from(PATHS), sides, sides)
def test_snake_and_spiral_step_to_neighbours(scan, height, width):
    order = grid_permutation(scan, 0, height, width)
    row, column = order // width, order % width
    assert (row.diff().abs() + column.diff().abs() == 1).all()


@given(sides, sides)
def test_zigzag_takes_diagonal_after_diagonal(height, width):
    order = grid_permutation("zigzag", 0, height, width)
    row, column = order // width, order % width
    assert ((row + column).diff() >= 0).all()
    same_diagonal = (row + column).diff() == 0
    assert (row.diff()[same_diagonal].abs() == 1).all()


@given(scans, sides, sides)
def test_identity_is_the_order_of_the_patches(scan, height, width):
    for direction, order in enumerate(orders_of(scan, height, width)):
        if is_identity(scan, direction):
            assert torch.equal(order, torch.arange(height * width))


def test_identities_are_known():
    identities = {scan: [is_identity(scan, d) for d in range(num_directions(scan))] for scan in SCANS}
    assert identities == {
        "unidirectional": [True],
        "bidirectional": [True, False],
        "multidirectional": [True, False, False, False],
        "snake": [False],
        "spiral": [False],
        "zigzag": [False],
    }


@given(scans, st.integers(0, 40))
def test_a_layer_takes_its_number_modulo_the_directions(scan, layer):
    order = grid_permutation(scan, layer, 3, 4)
    assert torch.equal(order, orders_of(scan, 3, 4)[layer % num_directions(scan)])
    assert is_identity(scan, layer) == is_identity(scan, layer % num_directions(scan))


# --- a sequence with pictures -------------------------------------------------------------------------


def sequence_orders_by_loop(layout, span_orders):
    """layout: per row a list of numbers, so much text, or "picture"; span_orders: D lists."""
    rows = []
    for row in layout:
        directions = []
        for span in span_orders:
            order = []
            for part in row:
                start = len(order)
                order += [start + i for i in (span if part == "picture" else range(part))]
            directions.append(order)
        rows.append(directions)
    return torch.tensor(rows)


@st.composite
def pictures_in_text(draw):
    """A scan, a grid, class tokens and rows of one length with any number of pictures anywhere."""
    scan, height, width = draw(scans), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    leading, trailing = draw(st.integers(0, 1)), draw(st.integers(0, 1))
    length = leading + height * width + trailing
    pictures = st.lists(st.one_of(st.integers(0, 3), st.just("picture")), max_size=5)
    layout = draw(st.lists(pictures, min_size=1, max_size=4))
    sizes = [sum(length if part == "picture" else part for part in row) for row in layout]
    total = max(*sizes, 1) if len(sizes) > 1 else max(sizes[0], 1)
    layout = [row + [total - size] for row, size in zip(layout, sizes)]
    return scan, height, width, leading, trailing, layout


@settings(max_examples=200)
@given(pictures_in_text())
def test_sequence_orders_equal_a_loop_over_pictures(case):
    scan, height, width, leading, trailing, layout = case
    length = leading + height * width + trailing
    mask = [
        [part == "picture" for part in row for _ in range(length if part == "picture" else part)]
        for row in layout
    ]
    last = leading + height * width
    spans = [
        [*range(leading), *(leading + order).tolist(), *range(last, length)]
        for order in orders_of(scan, height, width)
    ]
    orders = sequence_orders(torch.tensor(mask), scan, height, width, leading, trailing)
    assert torch.equal(orders, sequence_orders_by_loop(layout, spans))
    identity = torch.arange(orders.shape[-1]).expand(orders.shape)
    assert torch.equal(orders.gather(-1, inverse_order(orders)), identity)


def test_two_pictures_side_by_side_with_class_tokens():
    mask = torch.tensor([[0, *[1] * 8, 0]]).bool()
    orders = sequence_orders(mask, "bidirectional", 1, 3, trailing=1)
    assert orders.tolist() == [[[*range(10)], [0, 3, 2, 1, 4, 7, 6, 5, 8, 9]]]
    orders = sequence_orders(mask, "bidirectional", 1, 3, leading=1)
    assert orders.tolist() == [[[*range(10)], [0, 1, 4, 3, 2, 5, 8, 7, 6, 9]]]


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (3, 4)])
def test_text_alone_stays(shape):
    orders = sequence_orders(torch.zeros(shape, dtype=torch.bool), "spiral", 2, 2)
    assert torch.equal(orders, torch.arange(shape[1]).expand(shape[0], 1, shape[1]))


def test_compiles_in_one_graph():
    function = torch.compile(sequence_orders, backend="aot_eager", fullgraph=True)
    mask = torch.tensor([[0, *[1] * 4, 0]]).bool()
    assert torch.equal(function(mask, "spiral", 2, 2), sequence_orders(mask, "spiral", 2, 2))


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [num_directions, lambda scan: grid_permutation(scan, 0, 2, 2)])
def test_refuses_an_unknown_scan(function):
    known = "unidirectional, bidirectional, multidirectional, snake, spiral, zigzag"
    with pytest.raises(ValueError, match=rf"Unknown scan 'hilbert'\. Known: {known}\."):
        function("hilbert")
    with pytest.raises(ValueError, match=f"'rotation' is left out on purpose.* samples of a batch.*{known}"):
        function("rotation")


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("height", "width"), [(0, 3), (3, 0), (-1, 2)])
def test_refuses_a_grid_without_patches(scan, height, width):
    with pytest.raises(ValueError, match=f"at least one row and one column, got {height} x {width}"):
        grid_permutation(scan, 0, height, width)


@pytest.mark.parametrize(
    ("row", "found", "end"),
    [([0, 1, 1, 1, 0, 0], 3, 3), ([1] * 6, 6, 5), ([0, 1, 1, 1, 1, 1], 5, 5), ([0, 0, 1, 0, 0, 0], 1, 2)],
)
def test_refuses_part_of_a_picture(row, found, end):
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], row]).bool()
    message = (
        f"Sequence 1 has a run of {found} picture tokens that ends at position {end}, .* takes 4.* prefilling"
    )
    with pytest.raises(ValueError, match=message):
        sequence_orders(mask, "bidirectional", 2, 2)

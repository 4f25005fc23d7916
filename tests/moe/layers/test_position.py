from __future__ import annotations

import math

import torch

from moe.layers.position import document_positions, rotary_rotation, rotate, sinusoidal_embedding


def test_positions_restart_with_each_document() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 5, 5]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


def test_sinusoidal_table_is_the_formula() -> None:
    positions, d_model = torch.tensor([2, 3, 9]), 10
    table = sinusoidal_embedding(positions, d_model)
    for row, position in zip(table, positions.tolist(), strict=True):
        for i in range(d_model // 2):
            angle = position * 10000.0 ** (-i / (d_model // 2 - 1))
            assert math.isclose(row[i], math.sin(angle), abs_tol=2e-6)
            assert math.isclose(row[i + d_model // 2], math.cos(angle), abs_tol=2e-6)


def test_rotation_is_a_complex_product() -> None:
    positions = torch.tensor([[0, 1, 7, 100]])
    x = torch.randn(1, 2, 4, 6, dtype=torch.float32)
    rotated = rotate(x, rotary_rotation(positions, 6, 10000.0))
    as_complex = torch.complex(x[..., :3], x[..., 3:]).to(torch.complex128)
    frequency = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    expected = as_complex * torch.exp(1j * positions[0][:, None] * frequency)
    torch.testing.assert_close(torch.complex(rotated[..., :3], rotated[..., 3:]), expected.to(torch.complex64))


def test_rotated_products_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(query_at: int, key_at: int) -> float:
        turned = [
            rotate(x, rotary_rotation(torch.tensor([[at]]), 8, 500.0)) for x, at in ((query, query_at), (key, key_at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert math.isclose(product(5, 2), product(45, 42), abs_tol=1e-5)
    assert not math.isclose(product(5, 2), product(5, 3), abs_tol=1e-3)

"""The Arnoldi process: A Q = Q H with orthonormal rows, and its end where a space is exhausted."""

import torch

from deep_implicit_attention.solvers import _arnoldi

SIZES = torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64)[:, None, None]


def krylov(matrices, start, steps):
    """Q `(B, steps + 1, n)` and H `(B, steps + 1, steps)`."""
    batch, n = start.shape
    basis = start.new_zeros(batch, steps + 1, n)
    basis[:, 0] = start / start.norm(dim=1, keepdim=True)
    hessenberg = start.new_zeros(batch, steps + 1, steps)
    for k in range(steps):
        image = (matrices @ basis[:, k, :, None]).squeeze(2)
        hessenberg[:, : k + 2, k], _ = _arnoldi.extend(basis, k, image)
    return basis, hessenberg


def test_projects_a_matrix_of_any_size_on_orthonormal_rows():
    generator = torch.Generator().manual_seed(0)
    matrices = SIZES * torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    start = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    basis, hessenberg = krylov(matrices, start, 5)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(6).double().expand(3, 6, 6))
    torch.testing.assert_close((matrices @ basis[:, :5].mT) / SIZES, basis.mT @ hessenberg / SIZES)


def test_an_exhausted_space_ends_in_exact_zeros_whatever_its_batch_mates_are():
    generator = torch.Generator().manual_seed(0)
    # Three eigenvalues each, but those of the last: its space goes on.
    values = torch.tensor([1.0, 2.0, -3.0] * 3, dtype=torch.float64).repeat(3, 1)
    values[2] = torch.arange(1.0, 10.0)
    matrices = SIZES * torch.diag_embed(values)
    start = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    basis, hessenberg = krylov(matrices, start, 4)
    assert (hessenberg[:, 3, 2] == 0).tolist() == [True, True, False]
    assert (basis[:2, 3:] == 0).all()
    assert (hessenberg[:2, :, 3] == 0).all()
    torch.testing.assert_close(basis[2] @ basis[2].mT, torch.eye(5).double())

import pytest
import torch

from tealightning.functional.tail_shape import largest_atom, two_cluster_share


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_largest_atom_by_hand():
    values = torch.tensor([[3.0, 1.0, 1.0, 2.0, 3.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.1] * 6]).double()
    assert largest_atom(values).tolist() == [0.5, 0.0, 1.0]


def test_two_cluster_share_by_hand():
    """0, 0, 1 and 9, 9, 11: means 1/3 and 29/3, between 6/4 * (28/3)^2 = 392/3, within 2/3 + 8/3."""
    values = torch.tensor([[9.0, 0.0, 11.0, 1.0, 0.0, 9.0]]).double()
    assert two_cluster_share(values).item() == pytest.approx((392 / 3) / (392 / 3 + 10 / 3))


def test_two_cluster_share_of_known_distributions():
    assert two_cluster_share(normal(200, 500)).mean().item() == pytest.approx(2 / torch.pi, abs=0.01)
    assert two_cluster_share(torch.arange(1000.0).double()[None]).item() == pytest.approx(0.75, abs=1e-3)
    assert two_cluster_share(torch.tensor([[0.0] * 7 + [1.0] * 3]).double()).item() == pytest.approx(1.0)


def test_two_cluster_share_takes_no_outlier_for_a_cluster():
    values = torch.cat([normal(1, 50), torch.tensor([[1000.0, 1001.0]]).double()], dim=1)
    assert two_cluster_share(values).item() < 0.7
    assert two_cluster_share(torch.cat([values, torch.tensor([[1002.0]])], dim=1)).item() > 0.99


@pytest.mark.parametrize("magnitude", [1e-200, 1e200])
def test_two_cluster_share_does_not_depend_on_location_and_scale(magnitude):
    values = normal(5, 32)
    torch.testing.assert_close(two_cluster_share(magnitude * values), two_cluster_share(values))
    torch.testing.assert_close(two_cluster_share(values + 100), two_cluster_share(values))


def test_without_spread_or_samples_there_are_no_clusters():
    assert two_cluster_share(torch.full((2, 10), 0.1).double()).isnan().all()
    assert two_cluster_share(normal(2, 5)).isnan().all()
    assert two_cluster_share(normal(0, 10)).shape == largest_atom(normal(0, 10)).shape == (0,)

"Problems that break solvers, by name"
import torch

from ot_research.geometry import DenseCost, PointCloud
from ot_research.problem import Problem


def hard_problems(n: int) -> dict[str, Problem]:
    "About n points a side, in float64"
    draw = torch.Generator().manual_seed(0)
    uniform = lambda *shape: torch.rand(*shape, generator=draw, dtype=torch.float64)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    def weights(k):
        w = uniform(k) + 1e-3
        return w / w.sum()
    def gaps(k):
        w = torch.where(uniform(k) < 0.3, 0, uniform(k))
        return w / w.sum()
    def uneven(k):
        w = (20 * uniform(k)).exp()
        return w / w.sum()
    x = uniform(n, 2)
    few, many = n // 5, n - n // 5
    return dict(
        random_cost=Problem(DenseCost(uniform(n, n))),
        random_cost_weights=Problem(DenseCost(uniform(n, n - n // 5)), weights(n), weights(n - n // 5)),
        negative_cost=Problem(DenseCost(normal(n, n)), weights(n), weights(n)),
        clusters=Problem(PointCloud(torch.cat([normal(many, 2) * .1, normal(few, 2) * .1 + 5]),
                                    torch.cat([normal(few, 2) * .1, normal(many, 2) * .1 + 5]))),
        duplicates=Problem(PointCloud(x[: n // 2].repeat(2, 1), uniform(n, 2))),
        same=Problem(PointCloud(x, x)),
        outlier=Problem(PointCloud(torch.cat([x, torch.tensor([[100., 100.]], dtype=torch.float64)]), uniform(n + 1, 2))),
        constant_cost=Problem(DenseCost(torch.full((n, n), 3., dtype=torch.float64)), weights(n), weights(n)),
        one=Problem(PointCloud(uniform(1, 2), uniform(1, 2))),
        one_to_many=Problem(PointCloud(uniform(1, 2), uniform(50, 2)), weights(1), weights(50)),
        rectangular=Problem(PointCloud(uniform(n // 2, 3), uniform(n, 3)), weights(n // 2), weights(n)),
        zero_weights=Problem(PointCloud(uniform(n, 2), uniform(n, 2)), gaps(n), gaps(n)),
        uneven_weights=Problem(PointCloud(uniform(n, 2), uniform(n, 2)), uneven(n), uneven(n)),
        wide=Problem(PointCloud(uniform(n, 16), uniform(n, 16)), weights(n), weights(n)),
        euclidean=Problem(PointCloud(uniform(n, 2), uniform(n, 2), "euclidean")),
        callable_cost=Problem(PointCloud(uniform(n, 2), uniform(n, 2), lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1))),
        mass_of_seven=Problem(PointCloud(uniform(n, 2), uniform(n, 2)), 7 * weights(n), 7 * weights(n)),
        forbidden_pairs=Problem(DenseCost(torch.where((uniform(n, n) < .3) & ~torch.eye(n, dtype=torch.bool), torch.inf, uniform(n, n)))),
    )

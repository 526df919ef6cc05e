"Proximal points by Newton: bounds that hold, on every hard problem"
import ot
import pytest
import torch
from problems import hard_problems

from ot_research.annealing import typical_cost
from ot_research.proximal import newton_ipot
from ot_research.result import ConvergenceWarning

HARD = hard_problems(40)


@pytest.mark.parametrize("name", HARD)
def test_bounds_enclose_the_linear_program(name):
    problem = HARD[name]
    C, unit = problem.geometry.cost_rows(slice(None)), typical_cost(problem.geometry)
    result = newton_ipot(problem, beta=0.003 * unit)
    bounds, size = result.certificate(), C[C.isfinite()].abs().max() * problem.mass
    optimum = ot.emd2(problem.a.numpy(), problem.b.numpy(), C.nan_to_num(posinf=1e3).numpy())
    assert result.converged, result.status
    assert bounds.lower - 1e-12 * size <= optimum <= bounds.upper + 1e-12 * size
    assert result.f.isfinite().all() and result.g.isfinite().all()
    torch.testing.assert_close(result.plan.row, problem.a, atol=1e-12, rtol=0)


def test_running_out_of_steps_is_admitted():
    problem = HARD["wide"]
    with pytest.warns(ConvergenceWarning): result = newton_ipot(problem, beta=1.0, n_iter=4)
    assert not result.converged and result.n_iter == 4
    assert [t for t, _, _ in result.log] == [1, 2, 4] and result.log[-1][1] == 1.0 / 4


def test_a_batch_is_its_members():
    one = HARD["random_cost"]
    C = torch.stack([one.geometry.C, one.geometry.C.T])
    batch = newton_ipot(type(one)(type(one.geometry)(C)), beta=0.01)
    assert batch.converged.shape == (2,) and batch.converged.all()
    torch.testing.assert_close(batch.value[0], newton_ipot(one, beta=0.01).value, atol=1e-12, rtol=0)


def test_bad_settings_are_refused():
    for name in ("beta", "n_iter", "tol"):
        with pytest.raises(ValueError, match=f"{name} must be"): newton_ipot(HARD["one"], **{"beta": 1.0, name: -1})

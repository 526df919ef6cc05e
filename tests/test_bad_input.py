"Bad input is refused where it enters, by name, with the number that is wrong and what would be right"
import re
from math import inf, nan

import pytest
import torch

from ot_research import solve, solve_sample

N, M = 5, 4
pytestmark = pytest.mark.usefixtures("as_installed")  # the shape checks would catch some of these first


def by_matrix(x, y, a=None, b=None, **options):
    return solve((x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1), a, b, **options)


def problem(*batch) -> dict:
    "Two clouds and their weights"
    shapes = dict(x=(N, 2), y=(M, 2), a=(N,), b=(M,))
    tensors = {name: torch.rand(*batch, *shape, dtype=torch.float64) + 0.1 for name, shape in shapes.items()}
    return tensors | {w: tensors[w] / tensors[w].sum(-1, keepdim=True) for w in "ab"}


def refused(door, error, *words, **arguments):
    "The call raises this error, and its message holds these words"
    with pytest.raises(error) as caught:
        door(**dict(reg=0.1) | arguments)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"


def spoiled(t: torch.Tensor, *values: float) -> torch.Tensor:
    "The last entries of the last of the batch replaced"
    t = t.clone()
    t.view(-1)[-len(values):] = torch.tensor(values, dtype=t.dtype)
    return t


both_doors = pytest.mark.parametrize("door", [by_matrix, solve_sample])
batches = pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=["one", "batch", "batches"])
regs = pytest.mark.parametrize("reg", [0.1, 0])


# --- Weights ---

@both_doors
@batches
@regs
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("values, words", [
    ((nan,), ["1 weights that are NaN or infinite"]),
    ((inf, -inf), ["2 weights that are NaN or infinite"]),
    ((-0.25, -0.5), ["2 negative weights", "-5.00e-01"]),
], ids=["nan", "inf", "negative"])
def test_weights_are_finite_and_not_negative(door, batch, reg, name, values, words):
    p = problem(*batch)
    refused(door, ValueError, f"^{name} has", *words, **p | {name: spoiled(p[name], *values)}, reg=reg)


@both_doors
@batches
def test_weights_carry_one_mass(door, batch):
    p = problem(*batch)
    double = p["b"].clone()
    double.view(-1, M)[-1] *= 2
    refused(door, ValueError, "masses, 1 and 2", "normalize", "rho or mass", **p | {"b": double})


@both_doors
@batches
@pytest.mark.parametrize("name", ["a", "b"])
def test_weights_carry_some_mass(door, batch, name):
    p = problem(*batch)
    empty = p[name].clone()
    empty.view(-1, empty.shape[-1])[-1] = 0
    refused(door, ValueError, f"^{name} has no mass", **p | {name: empty})


@both_doors
@batches
@pytest.mark.parametrize("name, size", [("a", N), ("b", M)])
def test_weights_fit_the_cost(door, batch, name, size):
    p = problem(*batch)
    short = p | {name: p[name][..., 1:]}
    refused(door, ValueError, f"^{name} has shape", str(size - 1), f"the cost has {size}", **short)


@both_doors
def test_batches_of_weights_fit_the_cost(door):
    p = problem(3)
    refused(door, ValueError, r"\(2, 5\)", "broadcast", **p | {"a": p["a"][:2]})


# --- Points and costs ---

@batches
@regs
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", lambda x, y: torch.cdist(x, y) ** 3])
@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("values", [(nan,), (inf, -inf)], ids=["nan", "inf"])
def test_points_are_finite(batch, reg, cost, name, values):
    p = problem(*batch)
    words = f"^{name} has {len(values)} coordinates that are NaN or infinite"
    refused(solve_sample, ValueError, words, **p | {name: spoiled(p[name], *values)}, cost=cost, reg=reg)


@batches
@regs
@pytest.mark.parametrize("values", [(nan,), (-inf, nan)], ids=["nan", "-inf"])
def test_costs_are_numbers_or_plus_infinity(batch, reg, values):
    C = spoiled(torch.rand(*batch, N, M), *values)
    refused(solve, ValueError, f"^C has {len(values)} entries that are NaN or -inf", C=C, reg=reg)


@batches
@regs
def test_the_costs_of_a_callable_are_finite_too(batch, reg):
    p = problem(*batch)
    cost = lambda x, y: torch.cdist(x, y) * nan
    refused(solve_sample, ValueError, "cost of some pairs is NaN", **p, cost=cost, reg=reg)


@pytest.mark.parametrize("scale, dtype", [(1e30, torch.float32), (1e300, torch.float64)])
def test_a_cost_that_overflows_is_named(scale, dtype):
    x, y = torch.rand(N, 2, dtype=dtype) * scale, torch.rand(M, 2, dtype=dtype)
    refused(solve_sample, ValueError, "overflows", str(dtype), x=x, y=y)


@batches
def test_a_zero_point_has_no_direction(batch):
    p = problem(*batch)
    p["y"] = spoiled(p["y"], 0, 0)
    refused(solve_sample, ValueError, "^y has a zero row", "cosine", **p, cost="cosine")


@batches
@regs
def test_forbidden_pairs_leave_a_way(batch, reg):
    C = torch.rand(*batch, N, M)
    C.view(-1, N, M)[-1, :, :2] = inf
    refused(solve, ValueError, "infeasible", "50.0000% of the mass", C=C, reg=reg)


# --- Shapes ---

@both_doors
@batches
@pytest.mark.parametrize("name", ["x", "y"])
def test_no_side_is_empty(door, batch, name):
    p = problem(*batch)
    few = {"x": p["x"], "y": p["y"]} | {name: p[name][..., :0, :]}
    refused(door, ValueError, r"not \(.*\b0\b.*\)", **few)


def test_points_have_coordinates():
    refused(solve_sample, ValueError, r"^x must be", r"\(5,\)", x=torch.rand(N), y=torch.rand(M))
    refused(solve_sample, ValueError, r"^x must be", r"\(5, 0\)", x=torch.rand(N, 0), y=torch.rand(M, 0))


@batches
def test_clouds_live_in_one_space(batch):
    p = problem(*batch)
    p["y"] = p["y"][..., :1]
    refused(solve_sample, ValueError, "x has 2 coordinates per point and y has 1", **p)


def test_a_cost_is_a_matrix():
    refused(solve, ValueError, "matrix", r"\(5,\)", C=torch.rand(N))


def test_batches_of_clouds_fit():
    x, y = torch.rand(2, N, 2), torch.rand(3, M, 2)
    refused(solve_sample, ValueError, "broadcast", r"\(2, 5, 2\)", r"\(3, 4, 2\)", x=x, y=y)


@batches
@pytest.mark.parametrize("cost, shape", [
    (lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).abs(), "2"),
    (lambda x, y: x.sum(-1), ""),
    (lambda x, y: torch.cdist(y, x), ""),
], ids=["a coordinate too many", "rows only", "transposed"])
def test_a_callable_gives_a_block_of_costs(batch, cost, shape):
    p = problem(*batch)
    refused(solve_sample, ValueError, "cost", "shape", **p, cost=cost)


def test_a_cost_has_a_known_name():
    words = "'manhattan'", "callable or one of", "cosine", "euclidean", "sqeuclidean"
    refused(solve_sample, ValueError, *words, **problem(), cost="manhattan")


# --- Types and devices ---

@both_doors
@batches
@pytest.mark.parametrize("name", ["a", "b", "x"])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.complex64, torch.float16, torch.bfloat16, torch.bool], ids=str)
def test_everything_is_float32_or_float64(door, batch, name, dtype):
    p = problem(*batch)
    wrong = p | ({"x": p["x"].to(dtype), "y": p["y"].to(dtype)} if name == "x" else {name: p[name].to(dtype)})
    if door is by_matrix and name == "x":
        door, wrong = solve, {"C": torch.ones(*batch, N, M).to(dtype)}
    refused(door, TypeError, str(dtype), "float32 or float64", **wrong)


@both_doors
@batches
@pytest.mark.parametrize("name", ["a", "b"])
def test_weights_live_where_the_cost_does(door, batch, name):
    p = problem(*batch)
    refused(door, ValueError, "devices", f"'{name}': 'meta'", "'cpu'", **p | {name: p[name].to("meta")})


@batches
def test_both_clouds_live_on_one_device(batch):
    p = problem(*batch)
    refused(solve_sample, ValueError, "devices", "'x': 'cpu'", "'y': 'meta'", **p | {"y": p["y"].to("meta")})


@pytest.mark.parametrize("name", ["x", "y", "a"])
def test_everything_is_a_tensor(name):
    p = problem()
    p[name] = p[name].tolist()
    refused(solve_sample, TypeError, f"^{name} must be a torch tensor, got list", **p)
    refused(solve, TypeError, "^C must be a torch tensor, got ndarray", C=torch.rand(N, M).numpy())


# --- Strengths, tolerances, iterations ---

@both_doors
@batches
@pytest.mark.parametrize("reg", [-0.1, nan, inf, True, 1j, "0.1", None, torch.ones(2)], ids=str)
def test_reg_is_one_number_that_is_not_negative(door, batch, reg):
    words = "^reg must be one finite number >= 0, in units of the cost", re.escape(f"not {reg!r}")
    refused(door, ValueError, *words, **problem(*batch), reg=reg)


@both_doors
@pytest.mark.parametrize("reg", [1e-20, 1e-300, 5e-324])
def test_a_reg_below_the_last_digit_of_the_cost_is_refused(door, reg):
    refused(door, ValueError, re.escape(f"a strength of {reg:.1e} is lost"), "reg=0", **problem(), reg=reg)


@both_doors
@regs
@pytest.mark.parametrize("tol", [-1e-6, nan, inf, True, "fine"])
def test_tol_is_one_number_that_is_not_negative(door, reg, tol):
    words = "^tol must be one finite number >= 0", re.escape(f"not {tol!r}")
    refused(door, ValueError, *words, **problem(), reg=reg, tol=tol)


@both_doors
@regs
@pytest.mark.parametrize("max_iter", [0, -1, 10.0, "many"])
def test_max_iter_counts(door, reg, max_iter):
    words = "^max_iter must be a whole number >= 1", re.escape(f"not {max_iter!r}")
    refused(door, ValueError, *words, **problem(), reg=reg, max_iter=max_iter)


# --- Mass that stays behind ---

@both_doors
@batches
@pytest.mark.parametrize(
    "rho", [0, -0.1, nan, True, 1j, "1", torch.ones(3), (1, 2, 3), (), (1, 0), (-1, None), (nan, 1)], ids=str)
def test_rho_is_a_price_or_a_pair_of_them(door, batch, rho):
    words = "^rho must be a number > 0 in units of the cost, or a pair"
    refused(door, ValueError, words, **problem(*batch), rho=rho)


@both_doors
@batches
@pytest.mark.parametrize("mass, word", [
    (0, "not 0"), (-0.5, "not -0.5"), (nan, "not nan"), (inf, "not inf"), (1.01, "not 1.01"),
    (True, "not True"), ("all", "not 'all'"), (1j, "not 1j"), (torch.tensor(1), None),
    (torch.ones(7), "not tensor"), (torch.ones(1, dtype=torch.int64), "not tensor"),
], ids=str)
def test_mass_is_an_amount_that_either_side_has(door, batch, mass, word):
    p = problem(*batch)
    if word is None: assert door(**p, reg=0.1, mass=mass).converged.all()  # all of it, as a whole number
    else: refused(door, ValueError, "^mass must be", re.escape(word), **p, mass=mass)


@both_doors
@pytest.mark.parametrize("batch", [(3,), (2, 3)], ids=["batch", "batches"])
def test_one_budget_too_large_is_found_in_a_batch(door, batch):
    mass = torch.full(batch, 0.5, dtype=torch.float64)
    refused(door, ValueError, "at most 1, the mass of the lighter side, not 1.5", **problem(*batch),
            mass=spoiled(mass, 1.5))


@both_doors
@batches
def test_rho_or_mass_not_both_and_not_without_entropy(door, batch):
    p = problem(*batch)
    refused(door, ValueError, "give one", **p, rho=1.0, mass=0.5)
    for way in (dict(rho=1.0), dict(rho=(None, 1.0)), dict(mass=0.5)):
        refused(door, NotImplementedError, "moves all the mass", "reg > 0", **p, **way, reg=0)


@both_doors
@batches
@pytest.mark.parametrize("way", [dict(rho=1.0), dict(mass=0.5)], ids=str)
def test_what_is_wrong_with_weights_is_wrong_all_the_same(door, batch, way):
    p = problem(*batch)
    refused(door, ValueError, "^b has 1 negative", **p | {"b": spoiled(p["b"], -1)}, **way)
    refused(door, ValueError, "^a has 1 weights that are NaN", **p | {"a": spoiled(p["a"], nan)}, **way)


@both_doors
@pytest.mark.parametrize("name", ["rho", "mass"])
def test_a_gradient_in_rho_or_mass_would_be_lost(door, name):
    value = torch.tensor(0.5, requires_grad=True)
    refused(door, NotImplementedError, f"^derivatives in {name}", "detach", **problem(), **{name: value})


@both_doors
def test_a_price_below_the_last_digit_of_the_cost_is_refused(door):
    refused(door, ValueError, "is lost in the rounding", **problem(), rho=1e-20)


# --- Starting from earlier potentials ---

@both_doors
@batches
def test_init_fits_the_problem(door, batch):
    p = problem(*batch)
    f, g = door(**p, reg=0.1).potentials
    refused(door, ValueError, r"^init: f has shape .*4,?\), .* needs .*5,?\)", **p, init=(g, f))
    refused(door, ValueError, "^init: g has 1 entries that are not finite", **p, init=(f, spoiled(g, nan)))
    refused(door, ValueError, "devices", "meta", **p, init=(f, g.to("meta")))
    refused(door, TypeError, "^f must be a torch tensor", **p, init=(None, g))
    refused(door, ValueError, "reg=0", "init", **p, init=(f, g), reg=0)


# --- Derivatives ---

@both_doors
@batches
@pytest.mark.parametrize("name", ["x", "y", "a", "b"])
def test_a_gradient_with_a_given_mass_is_refused(door, batch, name):
    p = problem(*batch)
    p[name].requires_grad_()
    refused(door, NotImplementedError, "^derivatives with a given mass", "detach", **p, reg=0.1, mass=0.5)


@both_doors
@batches
@pytest.mark.parametrize("name", ["x", "y", "a", "b"])
def test_what_exact_transport_cannot_differentiate_is_refused(door, batch, name):
    p = problem(*batch)
    p[name].requires_grad_()
    found = door(**p, reg=0)
    for loss in (found.potentials[0], found.plan.dense(), torch.autograd.grad(found.value.sum(), p[name], create_graph=True)[0]):
        with pytest.raises(NotImplementedError, match="vertex"):
            torch.autograd.grad(loss.sum(), p[name], retain_graph=True)

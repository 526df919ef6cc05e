"""Point clouds are streamed: memory grows with the points, not with the pairs

Each measurement has a process of its own, so that no memory freed by another test is there to be used again.
The full run, ten iterations on 100 000 points a side, beside the rivals, is benchmark b01.
"""
import json
import subprocess
import sys
from math import isnan

import pytest
from runner import ROOT

SETUP = """
import json, torch
from ot_research.bench import extra_memory, resident
from ot_research.geometry import DenseCost, PointCloud
from ot_research.plan import dual_bound
from ot_research.problem import Problem
from ot_research.scaling import half_step
from ot_research.solvers import sinkhorn
torch.set_num_threads(1)

def clouds(n, dtype=torch.float32):
    return torch.rand(n, 3, dtype=dtype), torch.rand(n, 3, dtype=dtype)

def half(n, **options):
    geometry, zero = PointCloud(*clouds(n, **options)), torch.zeros(n, **options)
    return lambda: half_step(geometry, zero, zero, 0.1)

half(64)()  # what PyTorch sets up once
"""
MB = 1e6


def measured(code: str) -> list[float]:
    "What the code prints as JSON, in a fresh process"
    command = [sys.executable, "-c", SETUP + code]
    numbers = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    if any(map(isnan, numbers)):
        pytest.skip("the system does not say how much memory a process held")
    return numbers


def test_a_half_step_on_50_000_points_needs_less_than_100_MB():
    (extra,) = measured("print(json.dumps([extra_memory(half(50_000))]))")
    assert extra < 100 * MB


def test_float64_and_other_costs_are_streamed_too():
    rows = measured("""
x, y = clouds(5_000, dtype=torch.float64)
zero, calls = torch.zeros(5_000, dtype=torch.float64), []
for cost in ("sqeuclidean", "cosine", "euclidean", torch.cdist):
    problem = Problem(PointCloud(x, y, cost))
    calls.append(lambda geometry=problem.geometry: half_step(geometry, zero, zero, 0.1))
    calls.append(lambda problem=problem: dual_bound(problem, zero))
print(json.dumps([extra_memory(call) for call in calls]))
""")
    written_out = 8 * 5_000**2
    assert max(rows) < written_out / 4


def test_iterations_on_100_000_points_stay_under_1_GB_in_all():
    total, extra = measured("""
x, y = clouds(100_000)
problem = Problem(PointCloud(x, y[:10_000]))
extra = extra_memory(lambda: sinkhorn(problem, reg=0.1, tol=0.0, max_iter=2))
print(json.dumps([resident("VmHWM"), extra]))
""")
    assert total < 1000 * MB and extra < 200 * MB


def test_a_hessian_product_on_6_000_points_writes_no_table():
    "Potentials of another strength, so that entries are neither kept nor few: all is streamed"
    (extra,) = measured("""
from ot_research.implicit import attach
x, y = clouds(6_000, dtype=torch.float64)
w, zero, way = torch.full((6_000,), 1 / 6_000, dtype=torch.float64), torch.zeros(6_000, dtype=torch.float64), torch.ones_like(x)
f = -0.5 * half_step(PointCloud(x, y), zero, zero, 0.5)

def product():
    z = x.clone().requires_grad_()
    found = attach(PointCloud(z, y), w, w, 0.5, f, zero)
    (slope,) = torch.autograd.grad(found.value, z, create_graph=True)
    torch.autograd.grad(slope, z, way)

print(json.dumps([extra_memory(product)]))
""")
    assert extra < 8 * 6_000**2 / 4

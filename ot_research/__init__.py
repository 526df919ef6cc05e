__version__ = "0.1.0"

from .doors import solve, solve_sample

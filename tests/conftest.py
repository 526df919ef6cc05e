"Shapes are checked, threads are one, seeds are fixed"
from jaxtyping import install_import_hook

CHECK = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"  # an int is a float too
install_import_hook("ot_research", CHECK)  # before anything imports the package

import hypothesis
import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture
def as_installed(monkeypatch):
    "Without the shape checks, as users run it: sixteen times faster on small problems"
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

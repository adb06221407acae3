"""Settings and fixtures of the Python tests. A fixed seed everywhere: a failure repeats."""

from __future__ import annotations

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine and this build have."""
    if request.param == "cuda":
        import onepass

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if "cuda: absent" in onepass.info():
            pytest.skip("built without CUDA")
    return torch.device(request.param)

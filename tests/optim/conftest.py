"""Every kernel that this machine has, one after the other."""

import pytest

from stepwell.optim import engines


@pytest.fixture(params=engines.NAMES)
def kernel(request, monkeypatch):
    """Make one kernel the best there is, and return it."""
    engine = engines.load(request.param)
    if engine is None:
        pytest.skip(f"this machine cannot have the kernel in {request.param}")
    monkeypatch.setattr(engines, "best", lambda: engine)
    return engine

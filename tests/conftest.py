"""What every test leaves as it was."""

from collections.abc import Iterator

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry


@pytest.fixture(autouse=True)
def backend_of_the_process() -> Iterator[None]:
    """`set_attention_backend` also sets diffusers' process-wide default, and `reset_attention_backend` leaves that.

    With "_native_math" left behind, every model of a later test would run on the plain kernel, and two of them in two
    threads would leave torch's own switches there, too.
    """
    before = Registry._active_backend
    yield
    Registry.set_active_backend(before)

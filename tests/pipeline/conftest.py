"""A checkout in which the smoke profile has run, for the tests of the whole pipeline."""

from __future__ import annotations

import pytest

from .checkouts import make_checkout, run


@pytest.fixture(scope="session")
def finished(root, tmp_path_factory):
    """A checkout in which `rlhf run --profile smoke` has ended well, and its output."""
    checkout = make_checkout(root, tmp_path_factory.mktemp("checkout"))
    done = run(["rlhf", "run", "--profile", "smoke"], checkout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return checkout, done

"""pytest plugin of Infuse: the fixture `infuse`, and --infuse-update-lock.

    def test_my_model(infuse):
        infuse.assert_rewrites(model, (tokens,), expect={"attention": 32})
        infuse.check_lock(model, (tokens,))

pytest loads this in every project where Infuse is installed, so it lies outside the package, whose import takes torch
with it: neither is imported before a test asks for the fixture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from infuse.report import Report


class RewriteChecks:
    """`infuse.testing` for one test. path: the lock file. update: write to it instead of comparing."""

    def __init__(self, node_id: str, path: Path, update: bool) -> None:
        self.node_id = node_id
        self.path = path
        self.update = update

    def assert_rewrites(self, model: Any, args: Any = (), **keywords: Any) -> Report:
        """As infuse.testing.assert_rewrites."""
        from infuse.testing import assert_rewrites

        return assert_rewrites(model, args, **keywords)

    def check_lock(self, model: Any, args: Any = (), *, name: str = "", **keywords: Any) -> Report:
        """As infuse.testing.check_lock, under the id of the test; name: tells several models of one test apart."""
        from infuse.testing import check_lock

        given = {"path": self.path, **keywords}
        given["update"] = self.update or keywords.get("update", False)
        return check_lock(model, args, name=f"{self.node_id} {name}".rstrip(), **given)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("infuse").addoption(
        "--infuse-update-lock",
        action="store_true",
        help="write what Infuse does in the tests' models into infuse.lock instead of comparing it",
    )


@pytest.fixture
def infuse(request: pytest.FixtureRequest) -> RewriteChecks:
    """Checks of what Infuse rewrites; the lock file is infuse.lock in pytest's root folder."""
    config = request.config
    update = bool(config.getoption("--infuse-update-lock"))
    return RewriteChecks(request.node.nodeid, config.rootpath / "infuse.lock", update)

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def source_cache(tmp_path_factory):
    """Converted weights go to a folder of this session, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        if "TFXFER_CACHE" not in os.environ:
            patch.setenv("TFXFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield

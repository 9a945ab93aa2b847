import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real clips, beside the repository or named by DLS_SHARED; tests that use it skip without it."""
    folder = Path(os.environ.get("DLS_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no real clips in {folder}")
    return folder

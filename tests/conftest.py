import os
from pathlib import Path

import numpy as np
import pytest
import soundfile


def pytest_addoption(parser):
    space = parser.getgroup("Space in a browser")
    space.addoption("--space_run", type=Path, help="a finished fine-tuning on ESC-10 to show (default: a quick one)")
    space.addoption("--space_picture", type=Path, help="where to keep a picture of the page")
    space.addoption("--label_index", type=Path, help="an index of ESC-50's audio folder to picture dls label with")
    space.addoption("--label_pictures", type=Path, help="a folder for them")
    parser.addoption("--hostile_results", type=Path, help="where test_hostile_input.py is to sum up what it tried")


def pytest_configure():
    # Before torch is imported, here and in what tests start: threads of networks as tiny as the tests' mostly wait for
    # one another, and a sum in another number of threads is another number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real clips, beside the repository or named by DLS_SHARED; tests that use it skip without it."""
    folder = Path(os.environ.get("DLS_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no real clips in {folder}")
    return folder


@pytest.fixture(scope="session")
def sound_folder(tmp_path_factory) -> Path:
    """A folder of 40 half-second sounds in four classes, with a metadata.csv that gives labels and two folds."""
    folder = tmp_path_factory.mktemp("sounds")
    random = np.random.default_rng(0)
    time = np.arange(4000) / 8000
    rows = ["file_name,label,fold"]
    for clip in range(40):
        label = clip % 4
        tone = np.sin(2 * np.pi * 200 * 2**label * random.uniform(0.9, 1.1) * time)
        sound = 0.2 * tone * (1 + random.uniform(0, 1) * np.sin(2 * np.pi * 4 * time))
        soundfile.write(folder / f"{clip:02d}.wav", sound + 0.005 * random.standard_normal(4000), 8000)
        rows.append(f"{clip:02d}.wav,class-{label},{clip // 4 % 2 + 1}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder

"""Imports torchaudio, or sees to it that nobody does.

transformers imports it wherever it is installed, and could not be imported itself beside one that does not load: one
that was built for another torch than the one that is there.
"""

import sys
from importlib.util import find_spec

from transformers.utils.import_utils import is_torchaudio_available

PROBLEM: Exception | None = None  # why it cannot be loaded

if "torchaudio" not in sys.modules and find_spec("torchaudio"):
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # also of libraries that it is linked with
        PROBLEM = error
        sys.modules["torchaudio"] = None  # type: ignore[assignment]  # to Python: there is none
        is_torchaudio_available.cache_clear()

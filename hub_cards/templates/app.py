"""The page of this Space: what the network in model/ says of a sound. `python app.py` serves it on any machine."""

import os
from pathlib import Path

from dls_sounds.page.app import serve

if __name__ == "__main__":
    model = Path(__file__).parent / "model"
    serve(model, None, int(os.environ.get("GRADIO_SERVER_PORT", "7860")), host="0.0.0.0")

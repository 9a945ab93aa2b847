"""A page to try a trained folder: `python -m hub_cards space RUN_FOLDER`."""

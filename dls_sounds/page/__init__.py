"""The page: `dls label INDEX` teaches, `python -m hub_cards space RUN_FOLDER` tries a trained folder. Needs Gradio."""

from importlib import import_module

from datasets_scripts.errors import UserError

from ..settings import LabelSettings


def main(settings: LabelSettings) -> None:
    """Runs `dls label`: serves the page until it is interrupted.

    Raises:
        UserError: naming what the user can mend.
    """
    from ..index import Index
    from ..labelling import Session

    session = Session(Index(settings.index), settings.labels)
    load_app().serve(settings.run_folder, [], settings.port, session, settings)


def load_app():
    """The module with the page itself.

    Raises:
        UserError: if Gradio is not installed.
    """
    try:
        return import_module(".app", __package__)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio: pip install -e '.[space]'") from error

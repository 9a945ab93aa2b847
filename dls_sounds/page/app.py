"""The page: an `Analysis` laid out for a reader. Asks nothing of other machines."""

import html
import logging
import os
import signal
import tempfile
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before its import: it would report who uses it

import gradio as gr
import soundfile
import torch

from datasets_scripts import decode_audio
from datasets_scripts.errors import AudioError, UserError
from dls_training.runtime import start_logging

from ..labelling import Session
from ..settings import LabelSettings
from .analysis import NEIGHBOURS, Analysis, TrainedFolder, in_words
from .pictures import map_figure, spectrogram_figure, time_line_figure
from .teaching import KEYBOARD, ExampleEmbedder, Teaching, lay_out
from .teaching import STYLE as TEACHING_STYLE

logger = logging.getLogger("dls")

HOST = "127.0.0.1"
WAITING = 32  # visitors who may queue for the one analysis that runs at a time
PLAYED_SECONDS = 30.0  # of a neighbour
LARGEST_UPLOAD = "1gb"
FONT = ["system-ui", "sans-serif"]  # of the visitor's machine: Gradio's own comes from elsewhere
STYLE = """
.gradio-container { max-width: 1240px !important; margin: auto; }
:is(#problem, .problem) { border-left: 4px solid #c2410c; padding: 0.4em 0.9em; background: #c2410c22; }
.dark audio { color-scheme: dark; }
.gradio-container .row { flex-wrap: wrap; }
.neighbours .clip { overflow-wrap: anywhere; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { padding: 6px !important; }
  .gradio-container .row > * { min-width: min(100%, 160px) !important; }
  .gradio-container .row > .column { flex: 1 1 100% !important; }
  .gradio-container :is(.column, .block) { min-width: 0 !important; max-width: 100%; }
  .neighbours, .neighbours tbody { display: block; }
  .neighbours tr { display: flex; flex-wrap: wrap; align-items: center; }
  .neighbours tr:first-child { display: none; }
}
.block.titled { padding-top: 2.4em !important; }
.neighbours { width: 100%; }
.neighbours, .neighbours tr { border: none !important; }
.neighbours tr :is(td, th) { padding: 3px 8px; text-align: left; border: none; border-top: 1px solid #8883; }
.neighbours tr:first-child th { border: none; font-weight: normal; opacity: 0.7; }
.neighbours .clip { font-family: monospace; font-size: 0.85em; }
.neighbours audio { height: 34px; width: 230px; display: block; }
"""


class Page:
    """What the page does with a trained folder, and where it keeps the sounds that it plays.

    Attributes:
        trained: The folder.
        sounds: Folder of the WAV files that the page may play.
    """

    def __init__(self, trained: TrainedFolder, sounds: Path):
        self.trained, self.sounds = trained, sounds

    def analysed(self, path: str | None) -> list:
        """The values of `outputs`, in order, for a sound; all empty where there is none or it cannot be read."""
        if path is None:
            return self.nothing("")
        try:
            analysis = self.trained.analyse(path)
        except AudioError as error:
            return self.nothing(f"**This file cannot be read as a sound.** {html.escape(in_words(error, path))}")
        except OSError as error:
            return self.nothing(f"**This file cannot be read:** {error.strerror}")
        limit = f"The sound is long: only its first {analysis.seconds:.0f} s are analysed."
        is_long = len(analysis.windows) > 1
        has_line = is_long and bool(analysis.scores)
        remembered = self.trained.memory is not None
        return [
            gr.update(value=limit, visible=analysis.cut),
            gr.update(value=analysis.scores or None, visible=bool(analysis.scores)),
            gr.update(visible=True, **self.picture(analysis.spectrogram, analysis, analysis.loudest)),
            gr.update(value=self.neighbours(analysis), visible=bool(analysis.neighbours)),
            gr.update(value=map_figure(self.trained.memory, analysis) if remembered else None, visible=remembered),
            gr.update(value=time_line_figure(analysis) if has_line else None, visible=has_line),
            gr.update(value=window_rows(analysis), visible=is_long),
            analysis,
        ]

    @staticmethod
    def nothing(problem: str) -> list:
        hidden = [gr.update(value=None, visible=False) for _ in range(6)]
        return [gr.update(value=problem, visible=bool(problem)), *hidden, None]

    def chosen(self, path: str | None, analysis: Analysis | None, choice: gr.SelectData):
        """The spectrogram of the window whose row was clicked."""
        if path is None or analysis is None:
            return gr.update()
        window = choice.index[0]
        return gr.update(**self.picture(self.trained.spectrogram(path, window), analysis, window))

    def picture(self, spectrogram: torch.Tensor, analysis: Analysis, window: int) -> dict:
        """The value of the spectrogram's plot, and its label."""
        extractor = self.trained.network.extractor
        seconds = extractor.max_length / extractor.sampling_rate
        figure = spectrogram_figure(spectrogram, analysis.windows[window].start, seconds)
        return {"value": figure, "label": self.caption(analysis, window)}

    @staticmethod
    def caption(analysis: Analysis, window: int) -> str:
        if len(analysis.windows) == 1:
            return "What the network sees"
        loudest = ", the loudest" if window == analysis.loudest else ""
        return f"What the network sees of window {window + 1} of {len(analysis.windows)}{loudest}"

    def neighbours(self, analysis: Analysis) -> str:
        """A table of the nearest clips with players."""
        rows = []
        for neighbour in analysis.neighbours:
            label = html.escape(neighbour.label or "no label")
            rows.append(
                f"<tr><td>{self.player(neighbour.row)}</td><td><b>{label}</b></td>"
                f"<td class='clip'>{html.escape(neighbour.name)}</td><td>{neighbour.distance:.3f}</td></tr>"
            )
        head = "<tr><th></th><th>label</th><th>clip</th><th>distance</th></tr>"
        return f"<table class='neighbours'>{head}{''.join(rows)}</table>"

    def player(self, row: int) -> str:
        try:
            path = self.write_sound(f"{row}.wav", self.trained.memory.audio(row))
        except AudioError as error:
            return html.escape(str(error))
        return f"<audio controls preload='metadata' src='gradio_api/file={html.escape(str(path))}'></audio>"

    def write_sound(self, name: str, audio: dict) -> Path:
        """A clip as a WAV file, which every browser plays.

        Raises:
            AudioError: naming the clip, if it cannot be decoded.
        """
        path = self.sounds / name
        if not path.exists():
            samples, rate = decode_audio(audio, end=PLAYED_SECONDS)
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, samples.T, rate)
        return path

    def examples(self) -> tuple[list[str], list[str]]:
        """Files and their labels."""
        paths = []
        for number, (label, audio) in enumerate(self.trained.examples):
            plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in label)
            paths.append(str(self.write_sound(f"example-{number}/{plain}.wav", audio)))
        return paths, [label for label, _ in self.trained.examples]


def window_rows(analysis: Analysis) -> list[list]:
    """Of the table of windows."""
    rows = []
    for window in analysis.windows:
        name = max(window.scores, key=window.scores.get, default="")
        score = f"{window.scores[name]:.2f}" if name else ""
        rows.append([f"{window.start:.1f} to {window.end:.1f} s", name, score, f"{window.decibel:.0f}"])
    return rows


def build(page: Page | None, teaching: Teaching | None = None) -> gr.Blocks:
    """Lays the page out: what tries a trained folder, what teaches, or both, in tabs."""
    title = "DLS: teach by ear" if teaching else "DLS: try a sound"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        if teaching is None:
            lay_out_trial(page)
        elif page is None:
            lay_out(teaching)
        else:
            with gr.Tab("Teach"):
                lay_out(teaching)
            with gr.Tab("Try a sound"):
                lay_out_trial(page)
    return blocks


def lay_out_trial(page: Page) -> None:
    """Puts what tries a trained folder into the page that is being built."""
    trained, extractor = page.trained, page.trained.network.extractor
    seconds = f"{extractor.max_length / extractor.sampling_rate:g} s"
    paths, labels = page.examples()
    gr.Markdown(trained.task.introduction(trained, seconds))
    with gr.Row():
        with gr.Column(scale=5):
            sound = gr.Audio(
                type="filepath", sources=["upload", "microphone"], label="A sound: choose a file, or record",
                editable=False, buttons=["download"], elem_id="sound",
            )  # fmt: skip
            if paths:
                gr.Examples(paths, sound, example_labels=labels, label=f"Or a clip of {trained.examples_from}")
            problem = gr.Markdown(visible=False, elem_id="problem")
            scores = gr.Label(num_top_classes=5, label=trained.task.score, visible=False, elem_id="labels")
            spectrogram = gr.Plot(format="png", visible=False, elem_id="spectrogram", elem_classes="titled")
        with gr.Column(scale=6):
            neighbours = gr.HTML(
                label=f"The {NEIGHBOURS} nearest clips in the memory bank (distance: 1 − cosine)", show_label=True,
                container=True, visible=False, elem_id="neighbours", elem_classes="titled",
            )  # fmt: skip
            map_of_bank = gr.Plot(
                label="Where it lies among the clips that the network remembers", format="png", visible=False,
                elem_id="map", elem_classes="titled",
            )  # fmt: skip
            for sentence in trained.missing:
                gr.Markdown(html.escape(sentence), elem_classes="missing")
    time_line = gr.Plot(
        label="Over time", format="png", visible=False, elem_id="time-line", elem_classes="titled"
    )  # fmt: skip
    windows = gr.Dataframe(
        headers=["window", "label", "score", "level (dB)"], label="Windows: click on one to see its spectrogram",
        interactive=False, visible=False, max_height=300, elem_id="windows",
    )  # fmt: skip
    analysis = gr.State()
    outputs = [problem, scores, spectrogram, neighbours, map_of_bank, time_line, windows, analysis]
    # One analysis at a time: it uses every core, and more of them at once would only each be slower.
    once = {"concurrency_limit": 1, "concurrency_id": "network", "api_visibility": "private"}
    sound.change(page.analysed, sound, outputs, **once)
    windows.select(page.chosen, [sound, analysis], spectrogram, **once)


def serve(
    folder: Path | None, corpora: list[tuple[str, str | None]] | None, port: int, session: Session | None = None,
    settings: LabelSettings | None = None, host: str = HOST,
) -> None:  # fmt: skip
    """Shows the page until it is interrupted.

    Args:
        folder: A run's, to try sounds on; None: that part is left out.
        corpora: Names and folders of corpora, see `TrainedFolder`.
        port: Of the host.
        session: What is taught; None: that part is left out.
        settings: Of `dls label`, with a session.
        host: The interface; all but the default let others in.

    Raises:
        UserError: if the folder is not a run's output, or the port is taken.
        CorpusError: if a corpus cannot be used.
    """
    start_logging()
    trained = TrainedFolder(folder, corpora) if folder else None
    for sentence in trained.missing if trained else ():
        logger.warning(sentence)
    with tempfile.TemporaryDirectory(prefix="dls-space-") as sounds:
        page = trained and Page(trained, Path(sounds))
        teaching = session and Teaching(session, Path(sounds), ExampleEmbedder(session, settings))
        blocks = build(page, teaching).queue(max_size=WAITING)
        try:
            blocks.launch(
                server_name=host, server_port=port, share=False, ssr_mode=False, mcp_server=False, quiet=True,
                prevent_thread_lock=True, allowed_paths=[sounds], max_file_size=LARGEST_UPLOAD, footer_links=[],
                theme=gr.themes.Default(font=FONT, font_mono=["monospace"]), css=STYLE + TEACHING_STYLE,
                head=KEYBOARD if teaching else None,
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"--port {port} cannot be used on {host}, another program may have it: choose another"
            ) from error
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # to leave no sounds behind then, either
        if session:
            logger.info(f"answers go into {session.path}")
        logger.info(f"open http://{host}:{port} (Ctrl-C ends it)")
        blocks.block_thread()

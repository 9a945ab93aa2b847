"""The tab on which a person teaches: a `Session` laid out for ears, eyes and one hand.

What is asked, learned and ranked is the session's matter; nothing of that is here.
"""

import base64
import html
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import soundfile
from matplotlib.figure import Figure

from datasets_scripts import decode_audio
from datasets_scripts.errors import AudioError, UserError

from ..labelling import ORDERS, PROBABLE, Candidate, Session, clean_label
from ..searching import embed_query, load_embedder
from ..settings import LabelSettings
from .analysis import analysed_seconds
from .pictures import DPI, on_any_ground

logger = logging.getLogger("dls")

NEXT = 8  # of the list that are shown
PLAYED_SECONDS = 60.0  # of a window
EXAMPLE_SECONDS = 60.0  # of a sound that is no file of the index
NAMES = 9  # of other classes that have a key
FFT = 1024
QUIETEST = 80  # dB below the loudest, in the picture
KEYBOARD = """
<script>
(() => {
  const keys = {y: 'yes', n: 'no', s: 'pass', u: 'undo'}, fields = {c: 'class', e: 'example'};
  let busyUntil = 0;  // a key is about the sound that is heard, not about the one that comes
  new MutationObserver(changes => {
    if (changes.some(c => c.target.closest?.('#card'))) busyUntil = 0;
  }).observe(document, {childList: true, subtree: true, characterData: true, attributes: true});
  document.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase(), at = event.target;
    if (at.matches('input:not([type=radio]), textarea')) {
      if (key === 'escape') at.blur();
      if (key === 'enter' && at.closest('#class, #example')) setTimeout(() => at.blur(), 50);
      return;
    }
    if (key in fields) {
      const field = document.querySelector(`#${fields[key]} :is(input, textarea)`);
      if (field) { field.focus(); field.select(); event.preventDefault(); }
    } else if (key === ' ' && !at.matches('button, a, summary')) {
      const player = document.querySelector('#card audio');
      if (player) { player.paused ? player.play() : player.pause(); event.preventDefault(); }
    } else if (!event.repeat) {
      const button = document.getElementById(keys[key] ?? (/^[1-9]$/.test(key) ? `name-${key}` : 'none'));
      if (!button || Date.now() < busyUntil) return;
      busyUntil = Date.now() + 3000;
      button.click();
      event.preventDefault();
    }
  });
})();
</script>
"""
STYLE = """
#card img { width: 100%; max-width: 900px; height: auto; display: block; }
#card audio { width: 100%; display: block; margin: 6px 0; }
#card .clip, #next .clip { font-family: monospace; overflow-wrap: anywhere; }
#next :is(table, tr) { width: 100%; border: none !important; }
#next :is(td, th) { padding: 2px 8px; text-align: left; border: none; border-top: 1px solid #8883; }
#answers { gap: 8px; }
#answers button { min-width: 0 !important; flex: 1 1 20%; }
#names button { min-width: 0 !important; flex: 0 1 auto; }
@media (max-width: 640px) { #answers button { flex-basis: 40%; padding: 14px 4px; } }
"""
BEGINNING = """
<p><b>What do you want to find?</b></p><ol>
<li>Type the name of a class above and press Enter.</li>
<li>Give one example of it: the name of a file of the index, or a sound of your own. Without one you hear what is
most unlike the rest, until you say yes.</li>
<li>Listen and answer: each answer is written to labels.csv at once, and the list is ranked anew.</li></ol>
"""


class Teaching:
    """What the tab does with a session.

    Attributes:
        session: What is asked, learned and ranked.
        sounds: Folder of the WAV files that the page may play.
        embed: A sound file -> (dim,) vector of the index's network; raises UserError.
        rounds: How often something was shown.
    """

    def __init__(self, session: Session, sounds: Path, embed):
        self.session, self.sounds, self.embed, self.rounds = session, sounds, embed, 0

    def shown(self, label: str | None, order: str, row: int | None = None, problem: str = "") -> list:
        """The values of the tab's outputs: the first of the list, or a row that is asked for."""
        self.rounds += 1
        if label is None:
            return [message(problem), self.card_of(None, BEGINNING), "", "", None, None, *self.names(None)]
        try:
            self.session.refresh()
        except UserError as error:
            problem = problem or str(error)
        candidates = self.session.candidates(label, order, NEXT)
        if row is not None:
            candidates = [self.session.candidate(row), *(each for each in candidates if each.row != row)]
        first = candidates[0] if candidates else None
        nothing = "<p>Nothing is left to ask about: every sound has an answer, or was passed over.</p>"
        card = self.card(first) if first else self.card_of(None, nothing)
        return [
            message(problem), card, self.table(candidates[1:]), self.counts(label), first and first.row, label,
            *self.names(label),
        ]  # fmt: skip

    def card_of(self, row: int | None, content: str) -> str:
        return f"<div data-round='{self.rounds}' data-row='{'' if row is None else row}'>{content}</div>"

    def card(self, candidate: Candidate) -> str:
        """A window's name, player and spectrogram."""
        name = f"<p class='clip'>{place(candidate)}</p>"
        try:
            path, samples, rate = self.written(candidate)
        except AudioError as error:
            return self.card_of(candidate.row, f"{name}<p>{html.escape(str(error))}: pass it over.</p>")
        player = f"<audio controls autoplay src='gradio_api/file={html.escape(str(path))}'></audio>"
        picture = spectrogram_picture(samples, rate, candidate.start)
        return self.card_of(candidate.row, f"{name}{player}<img alt='spectrogram' src='{picture}'>")

    def written(self, candidate: Candidate) -> tuple[Path, np.ndarray, int]:
        """A window as a WAV file, which every browser plays, and what is in it.

        Raises:
            AudioError: naming the file, if it cannot be decoded.
        """
        source = {"bytes": None, "path": str(self.session.index.root / candidate.file)}
        end = min(candidate.end, candidate.start + min(PLAYED_SECONDS, analysed_seconds(source["path"])))
        samples, rate = decode_audio(source, candidate.start, end)
        path, mono = self.sounds / f"window-{candidate.row}.wav", samples.mean(axis=0)
        if not path.exists():
            soundfile.write(path, mono, rate)
        return path, mono, rate

    def table(self, candidates: list[Candidate]) -> str:
        rows = [f"<tr><td class='clip'>{place(each)}</td><td>{each.score:.2f}</td></tr>" for each in candidates]
        return f"<table><tr><th>next</th><th>score</th></tr>{''.join(rows)}</table>" if rows else ""

    def counts(self, label: str) -> str:
        present, absent = self.session.counts(label)
        missing = ""
        if not present and not self.session.examples.get(label):
            missing = " No example yet: you hear what is most unlike the rest."
        if self.session.gone:
            missing += f" {self.session.gone} files of the index are gone, and are left out."
        return f"<p><b>{html.escape(label)}</b>: {present} yes, {absent} no.{html.escape(missing)}</p>"

    def others(self, label: str | None) -> list[str]:
        """Classes that have a key."""
        return [name for name in self.session.classes if name != label][:NAMES] if label else []

    def names(self, label: str | None) -> list[dict]:
        others = self.others(label)
        return [
            gr.update(value=f"{n + 1} {others[n]}", visible=True) if n < len(others) else gr.update(visible=False)
            for n in range(NAMES)
        ]

    def begin(self, text: str, order: str) -> list:
        """A class was named."""
        try:
            return self.shown(clean_label(text), order)
        except UserError as error:
            return self.shown(None, order, problem=str(error))

    def after(self, do, label: str | None, order: str, row: int | None) -> list:
        """The list, after something was done that may fail: then the same row stays."""
        if label is None:
            return self.shown(None, order)
        try:
            row = do()
        except UserError as error:
            return self.shown(label, order, row, str(error))
        return self.shown(label, order, row)

    @staticmethod
    def about(row: int | None, do, *arguments):
        """What does something about a row, if there is one."""
        return lambda: None if row is None else do(row, *arguments)

    def answered(self, present: bool):
        def handler(label, order, row):
            return self.after(self.about(row, self.session.answer, label, present), label, order, row)

        return handler

    def named(self, number: int):
        """The key of another class."""

        def handler(label, order, row):
            others = self.others(label)
            if row is None or number >= len(others):
                return self.shown(label, order, row)
            return self.after(lambda: self.session.answer(row, others[number], True, label), label, order, row)

        return handler

    def passed(self, label, order, row) -> list:
        return self.after(self.about(row, self.session.pass_over), label, order, row)

    def undone(self, label, order, row) -> list:
        return self.after(self.session.undo, label, order, row)

    def example(self, text: str, label, order, row) -> list:
        """A file of the index is an example."""
        if label is None:
            return self.shown(None, order, problem="First name the class, then its example.")
        return self.after(lambda: self.session.answer(self.session.find(text), label), label, order, row)

    def uploaded(self, path: str | None, label, order, row) -> list:
        """A sound from elsewhere is an example."""
        if path is None:
            return self.shown(label, order, row)
        if label is None:
            return self.shown(None, order, problem="First name the class, then its example.")

        def learn():
            try:
                self.session.sounds_like(label, self.embed(Path(path)))
            except UserError as error:
                raise UserError(str(error).replace(path, Path(path).name)) from error

        return self.after(learn, label, order, row)

    def run(self, command: list[str]) -> Iterator[str]:
        """The last lines of a command's log as they come, and how it ended."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )  # fmt: skip
        lines = ["$ " + " ".join(command[2:])]
        yield log(lines)
        for line in process.stdout:
            lines = [*lines[:1], *lines[1:][-5:], line.rstrip().rpartition("\r")[2]]
            yield log(lines)
        lines.append("done" if process.wait() == 0 else "it failed: see above")
        yield log(lines)

    def train(self) -> Iterator[str]:
        try:
            yield from self.run([sys.executable, "-m", *self.session.training_command()])
        except UserError as error:
            yield message(str(error))

    def predict(self) -> Iterator[str]:
        try:
            yield from self.run([sys.executable, "-m", *self.session.prediction_command()])
        except UserError as error:
            yield message(str(error))


class ExampleEmbedder:
    """Sound files -> vectors of the network that made an index, which is loaded when the first one comes."""

    def __init__(self, session: Session, settings: LabelSettings):
        self.session, self.settings, self.embedder = session, settings, None

    def __call__(self, path: Path) -> np.ndarray:
        """(dim,) of a file's first `EXAMPLE_SECONDS`.

        Raises:
            UserError: if the file cannot be read, or the network is gone.
        """
        if self.embedder is None:
            self.embedder = load_embedder(self.session.index, self.settings)
        return embed_query(self.embedder, path, (0.0, EXAMPLE_SECONDS))


def message(text: str) -> str:
    return f"<div class='problem'>{html.escape(text)}</div>" if text else ""


def log(lines: list[str]) -> str:
    return "<pre style='white-space: pre-wrap'>" + html.escape("\n".join(lines)) + "</pre>"


def place(candidate: Candidate) -> str:
    return f"{html.escape(candidate.file)}, {candidate.start:g} to {candidate.end:g} s"


def spectrogram_picture(samples: np.ndarray, rate: int, start: float) -> str:
    """A data URI of what is heard: time from left to right, kHz from below."""
    padded = np.pad(samples, (0, max(0, FFT - len(samples))))
    step = max(FFT // 4, len(padded) // 1500)
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::step] * np.hanning(FFT)
    decibel = 10 * np.log10(np.square(np.abs(np.fft.rfft(frames))) + 1e-10).T
    figure = Figure(figsize=(7, 2.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    extent = (start, start + len(samples) / rate, 0, rate / 2000)
    axes.imshow(decibel, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=decibel.max() - QUIETEST)
    axes.set(xlabel="s", ylabel="kHz")
    file = io.BytesIO()
    on_any_ground(figure).savefig(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def lay_out(teaching: Teaching) -> None:
    """Puts the tab's parts into the page that is being built."""
    label, row = gr.State(None), gr.State(None)
    with gr.Row():
        class_name = gr.Textbox(label="Class (c)", placeholder="such as: owl", elem_id="class", max_length=200)
        example = gr.Textbox(
            label="An example of it (e): a file of the index", placeholder="north/night-1.wav @ 10", elem_id="example"
        )
    with gr.Accordion("Or a sound of your own as an example", open=False):
        upload = gr.Audio(type="filepath", sources=["upload", "microphone"], editable=False, elem_id="own-example")
    order = gr.Radio(list(ORDERS), value=PROBABLE, label="First the most", elem_id="order")
    problem = gr.HTML(elem_id="teaching-problem")
    counts = gr.HTML(elem_id="counts")
    card = gr.HTML(teaching.card_of(None, BEGINNING), elem_id="card")
    with gr.Row(elem_id="answers"):
        yes = gr.Button("Yes (y)", variant="primary", elem_id="yes")
        no = gr.Button("Not this (n)", elem_id="no")
        skip = gr.Button("Pass (s)", elem_id="pass")
        undo = gr.Button("Undo (u)", elem_id="undo")
    with gr.Row(elem_id="names"):
        names = [gr.Button(visible=False, elem_id=f"name-{number + 1}", size="sm") for number in range(NAMES)]
    gr.HTML("<small>Space plays and stops. A number says which other class it is instead. Esc leaves a field.</small>")
    following = gr.HTML(elem_id="next")
    with gr.Row():
        train = gr.Button("Train on these", elem_id="train")
        predict = gr.Button("Predict all", elem_id="predict")
    progress = gr.HTML(elem_id="progress")

    outputs = [problem, card, following, counts, row, label, *names]
    private = {"concurrency_limit": 1, "api_visibility": "private"}
    once = {**private, "concurrency_id": "session", "show_progress": "hidden"}
    state = [label, order, row]
    class_name.submit(teaching.begin, [class_name, order], outputs, **once)
    example.submit(teaching.example, [example, *state], outputs, **once)
    upload.change(teaching.uploaded, [upload, *state], outputs, **once)
    order.change(lambda label, order: teaching.shown(label, order), [label, order], outputs, **once)
    for button, handler in ((yes, teaching.answered(True)), (no, teaching.answered(False))):
        button.click(handler, state, outputs, **once)
    skip.click(teaching.passed, state, outputs, **once)
    undo.click(teaching.undone, state, outputs, **once)
    for number, button in enumerate(names):
        button.click(teaching.named(number), state, outputs, **once)
    long = {**private, "concurrency_id": "command"}
    train.click(teaching.train, None, progress, **long)
    predict.click(teaching.predict, None, progress, **long)

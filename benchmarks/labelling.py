"""One round of `dls label`: an answer is written down, the classifier made anew, the whole index ranked again.

    python benchmarks/labelling.py

The vectors are generated. A round begins with 21 answers in labels.csv and ends with the next window to be heard.
"""

import tempfile
from pathlib import Path

from measuring import Arm, run, summarise, take_turns
from search import write_index

ANSWERS = 21


def arms(folder: Path, windows: int, dim: int) -> dict[str, Arm]:
    from dls_sounds.index import Index
    from dls_sounds.labelling import Session

    path = folder / "index.parquet"
    write_index(path, windows, dim, root=folder)
    for number in range(-(-windows // 720)):
        (folder / f"{number}.wav").touch()
    session = Session(Index(path))
    for row in range(ANSWERS):
        session.answer(row, "class", row % 2 == 0)

    def round_of_labelling():
        (candidate,) = session.candidates("class")
        session.answer(candidate.row, "class", candidate.row % 2 == 0)
        session.candidates("class", count=10)
        session.undo()

    return {
        f"a round over {windows:,} windows x {dim}": Arm(round_of_labelling, 1, "rounds"),
        f"opening an index of {windows:,} windows x {dim}": Arm(lambda: Session(Index(path)), windows, "windows"),
    }


def measure(args) -> list[dict]:
    lines = []
    for windows, reach in zip(args.windows, ("< 0.2 s", "< 2 s"), strict=False):
        with tempfile.TemporaryDirectory() as temporary:
            made, seconds = take_turns([(arms, (Path(temporary), windows, args.dim))], args.rounds)
        own = summarise(made, seconds)
        own[0]["reach"] = reach
        lines += own
    return lines


if __name__ == "__main__":
    run(measure, windows=([2000, 100_000], "in the index"), dim=(128, "numbers of a vector"), rounds=7)

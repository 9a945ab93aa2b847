"""How long the imports and `--help` take, each in a fresh process.

python benchmarks/start_up.py
"""

import subprocess
import sys

from measuring import REPOSITORY, Arm, paired, ratio_line, run, summarise, take_turns

TRANSFORMERS = "from transformers import AutoModelForAudioClassification"
COMMANDS = {
    "python alone": ["-c", "pass"],
    TRANSFORMERS: ["-c", TRANSFORMERS],
    "the same, and import modeling_dls": ["-c", f"{TRANSFORMERS}; import modeling_dls"],
    **{f"{script} --help": [script, "--help"] for script in ("train_npid.py", "train_classification.py")},
    "dls --help": ["-m", "dls_sounds", "--help"],
    "dls predict --help": ["-m", "dls_sounds", "predict", "--help"],
}


def process_arms() -> dict[str, Arm]:
    def call(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)

    return {name: Arm(lambda words=words: call(words), 1, "starts") for name, words in COMMANDS.items()}


def measure(args) -> list[dict]:
    arms, seconds = take_turns([(process_arms, ())], args.rounds)
    lines = summarise(arms, seconds)
    for line in lines:
        if line["what"].endswith("--help"):
            line["reach"] = "<= 4 s"
    ratios = (ours / plain for ours, plain in paired(seconds, "the same, and import modeling_dls", TRANSFORMERS))
    return [*lines, ratio_line("import modeling_dls beside transformers / transformers alone", ratios)]


if __name__ == "__main__":
    run(measure, rounds=7)

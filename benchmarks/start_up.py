"""How long the imports and `--help` take, each in a fresh process.

python benchmarks/start_up.py
"""

import argparse
import subprocess
import sys
from pathlib import Path

from measuring import REPOSITORY, Arm, measured_on, paired, ratio_line, summarise, take_turns, write_table

TRANSFORMERS = "from transformers import AutoModelForAudioClassification"
COMMANDS = {
    "python alone": ["-c", "pass"],
    TRANSFORMERS: ["-c", TRANSFORMERS],
    "the same, and import modeling_dls": ["-c", f"{TRANSFORMERS}; import modeling_dls"],
    **{f"{script} --help": [script, "--help"] for script in ("train_npid.py", "train_classification.py", "embed.py")},
}


def process_arms() -> dict[str, Arm]:
    def run(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)

    return {name: Arm(lambda words=words: run(words), 1, "starts") for name, words in COMMANDS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    args = parser.parse_args()
    provenance = measured_on()
    arms, seconds = take_turns([(process_arms, ())], args.rounds)
    lines = summarise(arms, seconds)
    for line in lines:
        if line["what"].endswith("--help"):
            line["reach"] = "<= 4 s"
    ratios = (ours / plain for ours, plain in paired(seconds, "the same, and import modeling_dls", TRANSFORMERS))
    lines.append(ratio_line("import modeling_dls beside transformers / transformers alone", ratios))
    write_table(args.output, lines, provenance)


if __name__ == "__main__":
    main()

"""Run by torchrun: the first steps of a train_npid.py run whose batch norm stays in evaluation mode.

torchrun --nproc_per_node 2 distributed_steps.py OPTIONS_OF_TRAIN_NPID…
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import train_npid
from datasets_scripts.command_line import run_command
from dls_training.settings import PretrainingSettings

# Statistics of a batch depend on how it is divided over processes; everything else must not.
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)

if __name__ == "__main__":
    sys.exit(run_command(train_npid.main, PretrainingSettings.parsed()))

"""The main job by Lightning's own command line, from a YAML file of class paths.

    python recipes/lightning_cli.py fit --config recipes/lightning_cli.yaml

Any key may follow as an option (``--model.model gemma-3-270m/ --data.instruction "You are a pirate."``).
"""

from lightning.pytorch.cli import LightningCLI

from lit_thought import PairDataModule, ThoughtModule

if __name__ == "__main__":
    LightningCLI(ThoughtModule, PairDataModule)

# PYTHON_ARGCOMPLETE_OK
"""The ``lit-thought`` command: parser, output, errors, and a module for each kind of command."""

from lit_thought.cli.command import COMMANDS as COMMANDS
from lit_thought.cli.command import main as main

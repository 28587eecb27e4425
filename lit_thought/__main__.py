"""``python -m lit_thought``: the ``lit-thought`` command."""

from lit_thought.cli import main

main()

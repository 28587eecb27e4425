"""Recipes: scripts that put lit_thought to use, in folders by what a reader wants; see README.md.

A package, so that ``python -m recipes.FOLDER.NAME`` finds :mod:`recipes.harness`, what they share, from a checkout
alone, and never another package of this name.
"""

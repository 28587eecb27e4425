"""The thought patch: the change of a model, its algebra, and its file forms."""

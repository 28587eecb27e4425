"""Inputs that the model writes itself, where all there is is an instruction."""

"""Rewriting graphs: what Inductor is to find in the place of a quantised node."""

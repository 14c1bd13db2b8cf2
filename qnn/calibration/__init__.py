"""Statistics of what passes through a model, and the grids that follow from them."""

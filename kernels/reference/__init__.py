"""The meaning of each op, in plain torch."""

"""The declarations of all ops: where notation, reference and kernels come together."""

"""Names and sizes of the tensors of a `karst/1` file, as docs/adapter-file.md lists them."""

KRONECKER = ("karst_c", "karst_a", "karst_b")
# Axes of each tensor of a layer.
AXES = {
    "karst_c": "(N, p, q)",
    "karst_a": "(N, S, d_out/(S p), r)",
    "karst_b": "(N, r, d_in/q)",
    "scale": "(d_out,) or (1,)",
    "shift": "(d_out,) or (1,)",
    "in_scale": "(d_in,) or (1,)",
    "in_shift": "(d_in,) or (1,)",
    "norm_weight": "(d,)",
    "norm_bias": "(d,)",
}
NDIM = {name: axes.count(",") + 1 if name in KRONECKER else 1 for name, axes in AXES.items()}
PAIRS = (("scale", "shift"), ("in_scale", "in_shift"))
NORM = ("norm_weight", "norm_bias")
TYPICALITY_PREFIX = "typicality."
TYPICALITY = ("mean", "basis", "log_precision", "table")
MAX_TYPICALITY_RANK, MAX_TYPICALITY_TABLE = 256, 256

"""What is known of the opcodes of HLO and of the compiler's own custom calls: which of them cost something."""

# Instructions made of others, in a computation of their own, whose values in between never reach memory.
FUSIONS = {"fusion", "fusion-start"}
# Opcodes that move nothing themselves.
FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "iota",
    "partition-id", "replica-id", "after-all", "opt-barrier", "copy-done", "slice-done", "async-done",
    "collective-permute-done", "all-gather-done", "all-reduce-done", "async-update", "add-dependency", "domain",
    "get-dimension-size", "fusion-done",
}  # fmt: skip
# Opcodes that read only as much of their first operand as they return.
PARTIAL_READS = {"dynamic-slice", "slice", "gather"}
# Opcodes that exchange data with other chips.
COMMUNICATION = {
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "recv", "reduce-scatter",
    "send",
}  # fmt: skip
# Opcodes that read their operands and write their result, and do little else.
STREAMED = PARTIAL_READS | COMMUNICATION | {
    # elementwise
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan2", "atanh", "bitcast-convert", "cbrt", "ceil", "clamp",
    "compare", "complex", "convert", "cosh", "cosine", "count-leading-zeros", "divide", "erf", "exponential",
    "exponential-minus-one", "floor", "imag", "is-finite", "log", "log-plus-one", "logistic", "map", "maximum",
    "minimum", "multiply", "negate", "not", "or", "popcnt", "power", "real", "reduce-precision", "remainder",
    "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic",
    "shift-right-logical", "sign", "sine", "sinh", "sqrt", "stochastic-convert", "subtract", "tan", "tanh", "xor",
    # data movement
    "async-start", "broadcast", "concatenate", "copy", "dynamic-reshape", "dynamic-update-slice", "pad", "reshape",
    "reverse", "scatter", "select-and-scatter", "transpose",
    # reductions, sorting and random bits
    "reduce", "reduce-window", "rng", "rng-bit-generator", "rng-get-and-update-state", "sort", "topk",
    # a fusion's body is counted by itself
    "fusion",
}  # fmt: skip
# The compiler's own custom calls, by target, that contain no matrix product; what they move is not counted.
FREE_CUSTOM_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "CreateBuffer", "DeviceId",
    "GatherScatterIndicesBitpacked", "LayoutConstraint", "MoveToDevice", "MoveToHost", "PadToStatic", "PartialReduce",
    "PinToDevice", "PrepareAsyncCallDone", "PrepareAsyncCallStart", "Sharding", "SliceId", "SliceToDynamic", "TopK",
    "TopKBatchMajorSmallK", "TopKWithUnique", "X64Combine", "X64SplitHigh", "X64SplitLow", "ZeroCrop",
    "annotate_device_placement",
}  # fmt: skip

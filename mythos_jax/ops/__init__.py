"""The few operations that depend on the platform compiled for, or on how the mesh places their operands."""

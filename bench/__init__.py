"""The bench: every figure of DESIGN section 9, with its limit measured in the same run."""

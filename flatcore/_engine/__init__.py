"""From checked arguments to numbers: records, operators, paths, kernels. No formulas, and nothing a user calls."""

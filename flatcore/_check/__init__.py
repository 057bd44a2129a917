"""Whether the kernels give right numbers on this machine: found out here, kept, and handed to the engine."""

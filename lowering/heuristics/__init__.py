"""Pure functions from a problem and a device to a frozen kernel configuration, and the legality checks beside them.

What they say without a measurement of the user's own rests on stored results (benchmarks/results); a device or a dtype
that has none gets the decomposition.
"""

# The compute capability of the device that was measured. H100s share it: the same SMs beside slower memory.
H200 = (9, 0)

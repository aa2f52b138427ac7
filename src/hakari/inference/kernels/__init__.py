"""One file a kernel; `sampling.py` is where they run.

Step by step: `mh`, `da`, `da-exact`, `da-approx`. In batches: `independence`, `preconditioned`.
"""

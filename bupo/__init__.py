"""Bottom-up Policy Optimization: a minimal trainer on top of :mod:`bupo_kernels`."""

"""Triton kernels, one file per op. Imported by `timo.ops` when a kernel is about to run."""

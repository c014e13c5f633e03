"""Kernels: each folder holds one operation, its specification (``reference``) and one file for each backend."""

"""Configurations of kernels: for now their inspection without a device."""

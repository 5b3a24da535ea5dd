"""Products in Gluon, Triton's lower level, for Hopper GPUs: loads, products and output stages of a tile run at the same time.

Chosen by the configurations of ``ops/matmul.py``; the plain kernel there runs everywhere else and gives the same numbers.
"""

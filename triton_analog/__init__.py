"""Hardware-aware training for analog in-memory computing, as Triton kernels with a thin ``nn`` package on top."""

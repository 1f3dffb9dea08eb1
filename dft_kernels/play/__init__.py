"""A page on this machine to try steps of generation on: `dft-kernels play`."""

"""`dft-kernels`: one file a command, arguments and printing."""

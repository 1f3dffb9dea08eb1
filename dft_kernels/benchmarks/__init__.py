"""What `dft-kernels bench` runs: problems, implementations, measurement in processes of their own, tables, pictures.

Method. An implementation is a function from inputs to the mean loss. Its time is that of the loss, forward and
backward, against the *floor*: the matrix products that no implementation can do without, at full size, into
preallocated outputs, in the inputs' dtype or of fp32 copies, whichever is the faster here (floor.py). Floor and
implementations run interleaved, round by round, in one process, over several sets of inputs, random or of a real model
(real.py); a ratio is taken within a round, and the median over the rounds is what is printed, with the smallest and the
largest. On CUDA the clock is events, and the L2 cache is overwritten before every call. Memory is the peak over what
was held just before the call, in a fresh process, returned gradients included. Errors are distances to float64. Who
does not run, or takes too long for one call, says why.
"""

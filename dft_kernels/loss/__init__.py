"""The loss call: checked into a `Problem`, run by the chunk loop, under autograd."""

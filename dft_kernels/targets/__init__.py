"""Statistics of human writing as a target: counted, blended, kept on disk."""

"""Models and texts by name: folders, files, and what the package index brings."""

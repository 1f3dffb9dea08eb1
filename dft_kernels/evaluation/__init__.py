"""How far a model's distributions and writing lie from human writing."""

"""What a base model is: asked once, of its config and the names of its files, and carried from there."""

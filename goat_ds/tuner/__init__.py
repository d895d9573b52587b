"""GOAT in PEFT: its config, its layer, its model."""

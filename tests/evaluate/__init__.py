"""Tests of the room that judges models."""

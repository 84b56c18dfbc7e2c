"""Whole training steps against the models a user has today."""

"""Checks that a user runs on a configuration or a machine, each against something that must hold."""

"""Losses that keep experts evenly used."""

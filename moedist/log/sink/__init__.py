"""A file for each place that numbers can go to."""

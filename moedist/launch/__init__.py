"""From a command line to running ranks: compose once, decode, validate, make the run folder, start the ranks."""

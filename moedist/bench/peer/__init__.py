"""Other people's layers, a file each, imported only when one of them is asked for."""

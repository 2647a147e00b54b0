"""Shows runs from what they left in their folders: as an HTML page, and as a list.

Nothing here starts a rank or changes a run. A folder that is incomplete, damaged or still being written gives what can
be read of it, with notes on the rest.
"""

"""Pages and pictures from the JSON of a move or a series; nothing here runs a move."""

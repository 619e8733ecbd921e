"""Pages and pictures of what the JSON of a move or a series holds; nothing here runs anything."""

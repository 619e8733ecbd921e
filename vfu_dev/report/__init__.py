"""Pages and pictures of what an experiment's JSON holds; nothing here runs anything."""

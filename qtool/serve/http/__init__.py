"""HTTP: the routes, and the limits on whoever sends and reads."""

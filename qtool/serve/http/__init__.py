"""The HTTP routes, and the limits for clients."""

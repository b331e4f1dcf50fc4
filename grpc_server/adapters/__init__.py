"""One file a port: each adapts one library to what the domain asks for."""

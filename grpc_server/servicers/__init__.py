"""One servicer for each service of the API: proto to domain and back, once."""

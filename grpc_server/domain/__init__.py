"""What the service is about: types, errors, ports and pure rules. Standard library only."""

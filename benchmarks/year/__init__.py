"""A year of nights, simulated: real steps on a real log, only the model's answers are made up."""

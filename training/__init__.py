"""Curate, fine-tune, quantize, evaluate, gate, register: each step reads files and writes files."""

"""Frameworks whose models run with quantized weights as they are. One file per framework, imported by its name."""

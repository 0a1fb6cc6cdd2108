"""The recipe: sections and fields, read from YAML."""

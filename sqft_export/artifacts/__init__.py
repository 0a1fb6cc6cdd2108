"""Sealed folders of passes: manifests, and digests of their files."""

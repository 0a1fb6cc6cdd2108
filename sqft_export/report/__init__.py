"""Reports: what measured numbers become for a reader."""

"""Text in, text out: run a deployment, choose one of a run, and start servers. No torch."""
